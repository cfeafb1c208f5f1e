"""`EngineConfig`: what an engine may use, and how much."""

from __future__ import annotations

from dataclasses import dataclass

from lorax.errors import LoraxError


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. What is compiled depends on them, and on the model, alone.

    max_batch: sequences that run together.
    max_length: tokens of prompt and answer; the model's own limit if that is smaller.
    page_tokens: tokens whose keys and values (of all layers) make a page; adapters' weights lie in the same pages.
    pool_bytes: device bytes for keys, values and adapters together.
    pool_adapters: at most so many adapters on the device; None lets the pages alone decide.
    chunk: prompt tokens that are read beside one decoding step.
    max_rank: of any adapter ever loaded.
    max_queue: waiting requests; above it a request is refused as `Busy`.
    host_bytes: of adapters kept in host memory, packed; what is above lies on the disk.
    prefix_cache: keep the keys and values of what was read, for prompts that begin alike.
    patience: seconds of waiting that count as one more of priority, so that nobody waits for ever.
    state: a folder that keeps the registered adapters over a restart.
    compiled: a folder that keeps compiled programs.
    only: an adapter's folder; it is merged into the base and the engine serves it alone.
    tensor_parallel: devices that each layer is split over.
    """

    max_batch: int = 32
    max_length: int = 1024
    page_tokens: int = 16
    pool_bytes: int = 1 << 30
    pool_adapters: int | None = None
    chunk: int = 128
    max_rank: int = 64
    max_queue: int = 256
    host_bytes: int = 4 << 30
    prefix_cache: bool = True
    patience: float = 30.0
    state: str | None = None
    compiled: str | None = None
    only: str | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "page_tokens", "pool_bytes", "chunk", "max_rank", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise LoraxError(f"engine: {name} is {getattr(self, name)}; it must be at least 1")
        if self.max_queue < 0 or self.host_bytes < 0 or (self.pool_adapters is not None and self.pool_adapters < 1):
            raise LoraxError("engine: max_queue and host_bytes must be at least 0, pool_adapters at least 1")
        if not self.patience > 0:
            raise LoraxError(f"engine: patience is {self.patience}; it must be above 0 seconds")
