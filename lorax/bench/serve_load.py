"""A load as servers meet it: when requests arrive, whom they are for, how long they are; and what came of it.

    arrivals      gaps between requests ~ Gamma(1/cv^2, cv^2/rate): cv = 1 is Poisson, above is bursty
    popularity    P(the i-th adapter) ~ 1 / i^alpha
    lengths       prompt and answer uniform between bounds

The workload of S-LoRA (Sheng et al. 2023, section 7) and Punica. SLO attainment is the part of the requests whose first
token came within `slo_first` seconds and whose others came at most `slo_each` apart, on average.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Workload:
    """What is drawn.

    requests: how many.
    rate: requests a second.
    cv: coefficient of variation of the gaps between them.
    adapters: how many there are; 0 asks for the base alone.
    alpha: of the power law; 0 makes all equally popular.
    prompt, answer: bounds of the lengths in tokens.
    seed: of all draws.
    """

    requests: int = 64
    rate: float = 4.0
    cv: float = 1.0
    adapters: int = 5
    alpha: float = 1.0
    prompt: tuple[int, int] = (8, 64)
    answer: tuple[int, int] = (8, 64)
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """A request of the load: seconds from the start, adapter (None for the base), prompt ids, tokens of the answer."""

    at: float
    adapter: int | None
    prompt: tuple[int, ...]
    answer: int


def draw(load: Workload, vocab: int) -> list[Arrival]:
    """The requests of a workload, in the order in which they arrive. Prompts and lengths depend on the seed alone: for
    another number of adapters the same work arrives at the same times.

    Example:
        >>> [len(arrival.prompt) for arrival in draw(Workload(requests=3), 11)]
        [63, 60, 13]
    """
    times, people, texts = (np.random.default_rng((load.seed, stream)) for stream in range(3))
    gaps = times.gamma(1 / load.cv**2, load.cv**2 / load.rate, load.requests)
    weights = np.arange(1, max(load.adapters, 1) + 1, dtype=float) ** -load.alpha
    which = people.choice(len(weights), load.requests, p=weights / weights.sum())
    out = []
    for at, adapter in zip(np.cumsum(gaps), which, strict=True):
        count, answer = (int(texts.integers(low, high + 1)) for low, high in (load.prompt, load.answer))
        prompt = tuple(int(i) for i in texts.integers(0, vocab, count))
        out.append(Arrival(float(at), int(adapter) if load.adapters else None, prompt, answer))
    return out


def requests_of(arrivals: Sequence[Arrival], kind: str) -> list[Any]:
    """The engine's requests: greedy, of exactly the drawn lengths, for adapters named `kind-0`, `kind-1`, ..."""
    from lorax.serve import Request, Sampling

    greedy = Sampling(temperature=0.0)
    return [
        Request(
            a.prompt,
            None if a.adapter is None else f"{kind}-{a.adapter}",
            a.answer,
            greedy,
            ignore_eos=True,
            tenant=str(a.adapter),
        )
        for a in arrivals
    ]


def play(engine: Any, arrivals: Sequence[Arrival], kind: str) -> tuple[float, list[Any]]:
    """Submit each request at its time, whatever became of those before it.

    Returns:
        Seconds from the first arrival to the last token, and the usage of each request.
    """
    requests, usages, threads = requests_of(arrivals, kind), [None] * len(arrivals), []
    begin = time.perf_counter()

    def wait(place: int, handle: Any) -> None:
        usages[place] = handle.result().usage

    for place, (arrival, request) in enumerate(zip(arrivals, requests, strict=True)):
        time.sleep(max(0.0, begin + arrival.at - time.perf_counter()))
        thread = threading.Thread(target=wait, args=(place, engine.submit(request)))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin - arrivals[0].at, usages


def summary(seconds: float, usages: Sequence[Any], slo_first: float, slo_each: float) -> dict[str, Any]:
    """Throughput, percentiles in seconds, and SLO attainment."""
    first = np.array([u.first_token for u in usages], float)
    each = np.array([(u.total - u.first_token) / max(u.completion_tokens - 1, 1) for u in usages])
    within = (first <= slo_first) & (each <= slo_each)
    return {
        "seconds": seconds,
        "requests_per_second": len(usages) / seconds,
        "tokens_per_second": sum(u.completion_tokens for u in usages) / seconds,
        "first_token": percentiles(first),
        "time_per_token": percentiles(each),
        "slo_attainment": float(within.mean()),
    }


def percentiles(values: Any) -> dict[str, float]:
    """Of a list of seconds."""
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
