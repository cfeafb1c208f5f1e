"""What an engine does in a second, without a network: requests in, and the figures of the whole."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lorax.serve.engine import Engine
from lorax.serve.handle import Handle
from lorax.serve.request import Request, Usage


@dataclass(frozen=True)
class Measured:
    """Figures of a run.

    seconds: from the first request to the last token.
    tokens_per_second: generated tokens over seconds.
    decode_tokens_per_second: generated tokens over the seconds after the last of the first tokens; nan with a
        bound on concurrency.
    host_share: of the engine's busy time, what was not spent in the model.
    """

    seconds: float
    generated_tokens: int
    prompt_tokens: int
    tokens_per_second: float
    decode_tokens_per_second: float
    host_share: float
    usages: list[Usage]


def closed_loop(engine: Engine, requests: Sequence[Request], concurrency: int | None = None) -> Measured:
    """Run requests and measure.

    Args:
        engine: started.
        requests: all of them.
        concurrency: how many at a time; all at once by default (the engine's queue must have room).
    """
    before = engine.stats()
    begin = time.perf_counter()
    left = deque(requests)
    going: deque[Handle] = deque()
    usages: list[Usage] = []
    while left or going:
        while left and (concurrency is None or len(going) < concurrency):
            going.append(engine.submit(left.popleft()))
        usage = going.popleft().result().usage
        assert usage is not None
        usages.append(usage)
    seconds = time.perf_counter() - begin
    after = engine.stats()
    generated = sum(usage.completion_tokens for usage in usages)
    busy = after.step_seconds - before.step_seconds
    host = after.host_seconds - before.host_seconds
    first = max((usage.first_token or 0.0 for usage in usages), default=0.0)
    rest = seconds - first
    late = generated - len(usages)
    return Measured(
        seconds,
        generated,
        sum(usage.prompt_tokens for usage in usages),
        generated / seconds,
        late / rest if rest > 0 and concurrency is None else float("nan"),
        host / (host + busy) if host + busy else 0.0,
        usages,
    )
