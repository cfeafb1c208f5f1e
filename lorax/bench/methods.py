"""`lorax bench methods`: the step of each way to fine-tune against full fine-tuning's, and what an analysis takes.

The steps take turns in one run over the same examples of a demo task, so each figure is a ratio of medians. The batch
is a real one: its prompts are longer than its answers, and the loss counts the answers.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lorax.bench import record
from lorax.bench.methods_worker import STEPS
from lorax.bench.protocol import Worker
from lorax.errors import LoraxError
from lorax.train.runtime import MARK, TUNABLE

PAUSE = 0.2


@dataclass(frozen=True)
class MethodsConfig:
    """What is measured."""

    base: str = "smollm2-135m"
    """The base model."""
    task: str = "medical"
    """A demo task with a closed list of labels, or the path of a JSONL file."""
    batch_size: int = 16
    """Examples of a step."""
    rank: int = 16
    """Of the factors."""
    rounds: int = 3
    """Times that every step takes its turn."""
    threads: int = 0
    """Cores to use; 0 is all of this process's."""
    seed: int = 0
    """Decides the batch."""
    steps: tuple[str, ...] = ("full", "last-2", "lora", "dora", "head", "classification head")
    """Which steps; dpo is there too, for data of preferences or a task with labels."""


def run(config: MethodsConfig) -> dict[str, Any]:
    """Measure, and return everything as plain data: `figures`, `seconds`, `steps`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: numbers below one, a step that there is not, or a side that does not run.
    """
    if min(config.batch_size, config.rank, config.rounds) < 1:
        raise LoraxError("bench methods: batch_size, rank and rounds are at least 1")
    odd = [name for name in config.steps if name not in STEPS]
    if odd:
        raise LoraxError(f"bench methods: no step {odd[0]!r}; there are {', '.join(STEPS)}")
    busy = [os.getloadavg()[0]]
    threads = config.threads or len(os.sched_getaffinity(0))
    environment = {MARK: "1", "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", TUNABLE), "JAX_PLATFORMS": "cpu"}
    with Worker("lorax", [sys.executable, "-m", "lorax.bench.methods_worker"], environment) as worker:
        about = {"base": config.base, "task": config.task, "rank": config.rank, "seed": config.seed}
        worker.ask(op="load", threads=threads, batch=config.batch_size, **about)
        steps = {name: worker.ask(op="prepare", what=name) for name in config.steps}
        times: dict[str, list[float]] = {name: [] for name in config.steps}
        for _ in range(config.rounds):
            for name in config.steps:
                time.sleep(PAUSE)
                times[name].append(worker.ask(op="run", what=name)["seconds"])
        for name in config.steps:
            worker.ask(op="forget", what=name)
        analysis = worker.ask(op="analysis", rank=config.rank)
    busy.append(os.getloadavg()[0])
    seconds = {n: {"median": median(t), "least": min(t), "all": [round(x, 5) for x in t]} for n, t in times.items()}
    seconds["analysis"] = {"median": analysis["seconds"], "least": analysis["seconds"], "all": [analysis["seconds"]]}
    return {
        "bench": "methods",
        "config": {**asdict(config), "threads": threads},
        "machine": {**record.machine(), "load_average": busy},
        "versions": record.versions(),
        "steps": {name: {key: about[key] for key in ("parameters", "rows", "shape")} for name, about in steps.items()},
        "analysis": analysis,
        "figures": figures(config, seconds),
        "seconds": seconds,
    }


def figures(config: MethodsConfig, seconds: dict[str, Any]) -> dict[str, Any]:
    """The ratios, with the bound that each is held to."""

    def ratio(a: str, b: str) -> float | None:
        return seconds[a]["median"] / seconds[b]["median"] if a in seconds and b in seconds else None

    rows = {
        "classification_head_step_against_full_step": (ratio("classification head", "full"), 0.05),
        "lm_head_step_against_full_step": (ratio("head", "full"), 0.05),
        "last_2_step_against_full_step": (ratio("last-2", "full"), 0.45),
        "dora_step_against_lora_step": (ratio("dora", "lora"), 1.35),
        f"analysis_of_rank_{config.rank}_seconds": (seconds["analysis"]["median"], 20.0),
    }
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": ["most", bound],
            "met": None if value is None else value <= bound,
        }
        for name, (value, bound) in rows.items()
    }
