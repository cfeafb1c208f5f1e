"""`lorax bench multi`: many adapters in one batch, against the base alone, against a bank of five, and against PEFT.

Forwards take turns in one run; a training run is timed once, its compile time included, since that is what it costs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorax.bench import record
from lorax.bench.protocol import Worker
from lorax.errors import LoraxError

PAUSE = 0.3


@dataclass(frozen=True)
class MultiConfig:
    """What is measured."""

    base: str = "smollm2-135m"
    """The base model."""
    batch_size: int = 32
    """Examples of a forward."""
    seq_len: int = 64
    """Tokens of an example."""
    adapters: int = 32
    """Different adapters in the batch, on every linear map, ranks 4 to 64."""
    small: int = 5
    """Adapters of the small bank (queries and values)."""
    large: int = 1000
    """Adapters of the large bank (queries and values)."""
    tenants: int = 8
    """Adapters of the batch that PEFT runs as well."""
    train: int = 16
    """Adapters trained together; 0 leaves training out."""
    examples: int = 4
    """Examples of each adapter in a training step."""
    steps: int = 10
    """Steps of a training run."""
    peer_runs: int = 2
    """Training runs of PEFT that are timed; the median stands for each."""
    rounds: int = 5
    """Times that every forward takes its turn."""
    threads: int = 0
    """Cores that each side may use; 0 is all of this process's."""
    peer_python: str | None = None
    """A Python with torch, transformers and peft; without it only our own times are taken."""
    seed: int = 0
    """Draws tokens."""


def run(config: MultiConfig) -> dict[str, Any]:
    """Measure, and return everything as plain data: `figures`, `seconds`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: numbers below one, or a side that does not run.
    """
    if min(config.batch_size, config.seq_len, config.adapters, config.small, config.rounds, config.tenants) < 1:
        raise LoraxError("bench multi: batch_size, seq_len, adapters, small, tenants and rounds are at least 1")
    busy, threads = os.getloadavg()[0], config.threads or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ours = [sys.executable, "-m", "lorax.bench.multi_worker"]
        sides = {"lorax": stack.enter_context(Worker("lorax", ours, {"JAX_PLATFORMS": "cpu"}))}
        if config.peer_python is not None:
            sides["lorax"].ask(op="save", base=config.base, folder=folder)
            script = str(Path(__file__).with_name("peft_multi_worker.py"))
            sides["PEFT"] = stack.enter_context(Worker("PEFT", [config.peer_python, script]))
        load = {"threads": threads, "batch": config.batch_size, "length": config.seq_len, "seed": config.seed}
        base = config.base if "PEFT" not in sides else folder
        loaded = {name: worker.ask(op="load", base=base, **load) for name, worker in sides.items()}
        times, about = _forwards(config, sides)
        trained = _training(config, sides) if config.train else {}
    seconds = {name: {"median": median(t), "least": min(t)} for name, t in (times | trained).items()}
    return {
        "bench": "multi",
        "config": {**asdict(config), "threads": threads},
        "machine": {**record.machine(), "load_average": busy},
        "versions": {**record.versions(), **loaded.get("PEFT", {}).get("versions", {})},
        "bank": about,
        "figures": figures(config, seconds),
        "seconds": seconds,
    }


def _forwards(config: MultiConfig, sides: dict[str, Worker]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Two groups, so that the banks of one are given back before the other's are made."""
    turns = [("lorax", "base", 0, "all"), ("lorax", "mixed", config.adapters, "all")]
    turns.append(("lorax", "tenants", config.tenants, "all"))
    if "PEFT" in sides:
        # The peer's own base first: adapters, once put in, stay in its model.
        sides["PEFT"].ask(op="prepare", what="base")
        turns.append(("PEFT", "mixed", config.tenants, "all"))
    few = [("lorax", "small bank", config.small, "few"), ("lorax", "large bank", config.large, "few")]
    times: dict[str, list[float]] = {}
    about: dict[str, Any] = {}
    for group in (turns, few):
        for side, what, adapters, targets in group:
            answer = sides[side].ask(op="prepare", what=what, adapters=adapters, targets=targets)
            about[f"{side}: {what}"] = {"adapters": adapters, "bytes": answer.get("bytes")}
        for _ in range(config.rounds):
            for side, what, _, _ in group:
                time.sleep(PAUSE)
                times.setdefault(f"{side}: {what}", []).append(sides[side].ask(op="run", what=what)["seconds"])
        for side, what, _, _ in group:
            if side == "lorax":
                sides[side].ask(op="forget", what=what)
    return times, about


def _training(config: MultiConfig, sides: dict[str, Worker]) -> dict[str, list[float]]:
    shape = {"adapters": config.train, "examples": config.examples, "length": config.seq_len}
    shape |= {"steps": config.steps, "seed": config.seed}
    together = sides["lorax"].ask(op="together", **shape)
    runs = [sides["lorax"].ask(op="alone", which=i, **shape) for i in range(config.train)]
    for mine, own in zip(together["losses"], runs, strict=True):
        if abs(mine - own["loss"]) > 1e-3 * abs(own["loss"]):
            raise LoraxError(f"trained together the loss is {mine}, alone {own['loss']}: not the same thing")
    out = {"lorax: together": [together["seconds"]], "lorax: one after another": [sum(r["seconds"] for r in runs)]}
    if "PEFT" in sides and config.peer_runs:
        peer = [sides["PEFT"].ask(op="alone", which=i, **shape)["seconds"] for i in range(config.peer_runs)]
        out["PEFT: one after another"] = [median(peer) * config.train]
    return out


def figures(config: MultiConfig, seconds: dict[str, Any]) -> dict[str, Any]:
    """The ratios, with the bound that each is held to."""

    def ratio(a: str, b: str) -> float | None:
        return seconds[a]["median"] / seconds[b]["median"] if a in seconds and b in seconds else None

    rows = {
        f"{config.adapters}_adapters_against_the_base": (ratio("lorax: mixed", "lorax: base"), "most", 1.25),
        f"bank_of_{config.large}_against_{config.small}": (
            ratio("lorax: large bank", "lorax: small bank"),
            "most",
            1.05,
        ),
        f"PEFT_mixed_batch_of_{config.tenants}_against_ours": (ratio("PEFT: mixed", "lorax: tenants"), "least", 3.0),
        f"{config.train}_runs_against_together": (ratio("lorax: one after another", "lorax: together"), "least", 3.0),
        f"{config.train}_runs_of_PEFT_against_together": (
            ratio("PEFT: one after another", "lorax: together"),
            "least",
            3.0,
        ),
    }
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": [kind, bound],
            "met": None if value is None else (value <= bound if kind == "most" else value >= bound),
        }
        for name, (value, kind, bound) in rows.items()
    }
