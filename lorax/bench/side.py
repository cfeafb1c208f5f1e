"""What our sides of the benchmarks have in common: a base on so many cores, and compiled programs by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from lorax.bench.peft_worker import memory


class Side:
    """A model, and programs by name."""

    def __init__(self) -> None:
        self.model: Any = None
        self.programs: dict[str, Callable[[], Any]] = {}

    def save(self, base: str, folder: str) -> dict[str, Any]:
        """Write a base as a Hugging Face directory, the one that both sides read."""
        from lorax.models import load, save_hf

        model = load(base)
        save_hf(folder, model, model.params)
        return {"vocab": model.config.vocab_size}

    def read(self, base: str, threads: int, batch: int, length: int, seed: int) -> Any:
        """Keep to so many cores, read the base, and draw the batch's tokens: int32 (batch, length)."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import numpy as np

        from lorax.models import load

        self.model = load(base)
        return np.random.default_rng(seed).integers(0, self.model.config.vocab_size, (batch, length)).astype(np.int32)

    def about(self) -> dict[str, Any]:
        """Cores and memory of this process."""
        return {"threads": len(os.sched_getaffinity(0)), **memory()}

    def timed(self, what: str) -> tuple[float, Any]:
        """Seconds of one run of a program, and what it gave."""
        import jax

        begin = time.perf_counter()
        out = jax.block_until_ready(self.programs[what]())
        return time.perf_counter() - begin, out

    def forget(self, what: str) -> dict[str, Any]:
        """Give back a program's memory."""
        self.programs.pop(what, None)
        return memory()
