"""`lorax bench nf4`: quantise, dequantise and multiply on this machine's processor, beside bitsandbytes.

Both sides take turns in one run, on the same numbers, and must agree on the results before a ratio is given.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorax.bench import record
from lorax.bench.protocol import Worker
from lorax.errors import LoraxError

ROWS = (8, 1024)
OPERATIONS = ("quantise", "dequantise", *(f"matmul {n}" for n in ROWS))
PAUSE = 0.05


@dataclass(frozen=True)
class Nf4Config:
    """What is measured."""

    size: int = 4096
    """The weight is size x size, float32."""
    rounds: int = 15
    """Times that everything takes its turn."""
    threads: int = 0
    """Cores that each side may use; 0 is all of this process's."""
    peer_python: str | None = None
    """A Python with torch and bitsandbytes; without it only our own times are taken."""
    seed: int = 0
    """Draws the numbers."""


def run(config: Nf4Config) -> dict[str, Any]:
    """Measure, and return everything as plain data: `figures`, `seconds`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: a size that is no multiple of 64, a peer that does not run, or results that differ.
    """
    if config.size < 64 or config.size % 64 or config.rounds < 1:
        raise LoraxError(f"size {config.size}, rounds {config.rounds}: a multiple of 64 and at least one round, please")
    busy = os.getloadavg()[0]
    threads = config.threads or len(os.sched_getaffinity(0))
    load = {"op": "load", "threads": threads, "size": config.size, "rows": list(ROWS), "seed": config.seed}
    with ExitStack() as stack:
        command = [sys.executable, "-m", "lorax.bench.nf4_worker"]
        sides = {"lorax": stack.enter_context(Worker("lorax", command, {"JAX_PLATFORMS": "cpu"}))}
        if config.peer_python is not None:
            script = str(Path(__file__).with_name("bnb_worker.py"))
            sides["bitsandbytes"] = stack.enter_context(Worker("bitsandbytes", [config.peer_python, script]))
        loaded = {name: worker.ask(**load) for name, worker in sides.items()}
        turns = [(what, name) for what in OPERATIONS for name in sides]
        turns.insert(turns.index(("dequantise", "lorax")) + 1, ("x+1", "lorax"))
        first = {turn: sides[turn[1]].ask(op="run", what=turn[0]) for turn in turns}
        _agree(first, "bitsandbytes" in sides)
        times: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
        for _ in range(config.rounds):
            for turn in turns:
                time.sleep(PAUSE)
                times[turn].append(sides[turn[1]].ask(op="run", what=turn[0])["seconds"])
    seconds = {f"{name}: {what}": {"median": median(t), "least": min(t)} for (what, name), t in times.items()}
    peer = loaded.get("bitsandbytes", {})
    return {
        "bench": "nf4",
        "config": {**asdict(config), "threads": threads},
        "machine": {**record.machine(), "load_average": busy, "torch_capability": peer.get("capability")},
        "versions": {**record.versions(), **peer.get("versions", {})},
        "figures": figures(seconds),
        "seconds": seconds,
    }


def figures(seconds: dict[str, Any]) -> dict[str, Any]:
    """The ratios, with the bound that each is held to."""

    def ratio(a: str, b: str) -> float | None:
        return seconds[a]["median"] / seconds[b]["median"] if a in seconds and b in seconds else None

    rows = {
        "dequantise_against_bitsandbytes": (ratio("lorax: dequantise", "bitsandbytes: dequantise"), 2.0),
        "dequantise_against_x_plus_1": (ratio("lorax: dequantise", "lorax: x+1"), 1.4),
        "quantise_against_bitsandbytes": (ratio("lorax: quantise", "bitsandbytes: quantise"), 1.0),
        "matmul_8_rows_against_bitsandbytes": (ratio("lorax: matmul 8", "bitsandbytes: matmul 8"), 1.5),
        "matmul_1024_rows_against_bitsandbytes": (ratio("lorax: matmul 1024", "bitsandbytes: matmul 1024"), 1.05),
    }
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": ["most", bound],
            "met": None if value is None else value <= bound,
        }
        for name, (value, bound) in rows.items()
    }


def _agree(first: dict[tuple[str, str], dict[str, Any]], peer: bool) -> None:
    for what in OPERATIONS if peer else ():
        ours, theirs = first[what, "lorax"]["check"], first[what, "bitsandbytes"]["check"]
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            raise LoraxError(f"{what}: lorax gives {ours} and bitsandbytes {theirs}: not the same thing")
