"""What an engine counts, and a snapshot of it for whoever watches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterStats:
    """Of one adapter; "" is the base alone. loads: times that it was copied to the device."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    loads: int


@dataclass(frozen=True)
class Stats:
    """A snapshot. Counters run since the start; gauges are marked.

    waiting, running: requests (gauges). batch: rows of the last step (gauge).
    steps, step_seconds: of the model. host_seconds: of the engine's thread outside of the model.
    pages...: of the pool (gauges); pages_cached are the prefix cache's and free on demand.
    prefix_hits, prefix_lookups: in pages.
    compilations: after the start; zero, or something is wrong.
    finished: requests by how they ended. refused: for want of room in the queue.
    tenants: virtual token counters (gauge).
    """

    waiting: int
    running: int
    batch: int
    steps: int
    step_seconds: float
    host_seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    pages: int
    pages_kv: int
    pages_cached: int
    pages_adapters: int
    pages_free: int
    prefix_hits: int
    prefix_lookups: int
    loads_disk: int
    loads_device: int
    evictions_device: int
    evictions_host: int
    preemptions: int
    compilations: int
    finished: dict[str, int]
    refused: int
    adapters: dict[str, AdapterStats]
    tenants: dict[str, float]


@dataclass
class Counters:
    """What the engine's thread counts itself. by_adapter: requests, tokens of prompts, tokens of answers."""

    batch: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    by_adapter: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
