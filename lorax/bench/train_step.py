"""`lorax bench train`: the LoRA and QLoRA steps against PEFT, against full fine-tuning, and against its own floor.

All that is compared takes turns in one run: A B C A B C ... Each figure is a ratio of medians, so a machine that slows
down for a while slows both sides. The two programs read the same weights from the same directory, run on the same cores
and must compute the same loss before anything is timed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorax.bench import record
from lorax.bench.protocol import Worker
from lorax.errors import LoraxError
from lorax.train.runtime import MARK, TUNABLE

OURS = ("lora", "qlora", "full", "forward", "forward+lora", "features", "features+lora")

# A library's threads may spin for a while after their work; the next one starts after that.
PAUSE = 0.3

# Steps over which a process's peak is taken.
MEMORY_STEPS = 3


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    base: str = "smollm2-135m"
    """The base model, by any name that `lorax train` takes."""
    rank: int = 16
    """LoRA rank, on every linear map of every layer."""
    alpha: float = 32.0
    """LoRA alpha."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    batch_size: int = 8
    """Rows of the batch."""
    seq_len: int = 128
    """Tokens of a row; all count but the last, which has no target."""
    rounds: int = 5
    """Times that everything takes its turn."""
    threads: int = 0
    """Cores that each side may use; 0 is all of this process's."""
    peer_python: str | None = None
    """A Python with torch, transformers and peft; without it the two comparisons with PEFT are left out."""
    seed: int = 0
    """Draws the tokens."""

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            LoraxError: names the setting.
        """
        for name in ("rank", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise LoraxError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.seq_len < 2:
            raise LoraxError(f"seq_len is {self.seq_len}: must be at least 2")
        if not sys.platform.startswith("linux"):
            raise LoraxError(f"lorax bench reads /proc and pins threads, which {sys.platform} has not; run it on Linux")
        have = len(os.sched_getaffinity(0))
        if not 0 <= self.threads <= have:
            raise LoraxError(f"threads is {self.threads}: this process has {have} cores")


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and return everything that was measured as plain data.

    Args:
        config: what, and for how long: about half a minute a round on two cores for SmolLM2.

    Returns:
        `figures`: name -> {value, bound, met}, with None where no peer was given; `seconds`: name -> {median, least,
        all}; `memory`, `floor`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: a setting, a base or a peer that does not work; the two sides compute different losses.

    Example:
        run(BenchConfig(peer_python=".venv-peers/bin/python"))["figures"]["tokens_per_second_against_peft"]
    """
    config.check()
    busy = [os.getloadavg()[0]]
    config = dataclasses.replace(config, threads=config.threads or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        base = str(Path(folder) / "base")
        with _ours() as worker:
            worker.ask(op="save", base=config.base, folder=base)
        memory = _memories(config, base)
        timed = _times(config, base)
    # Against the threads of the workers: more than those, and something else was running.
    busy.append(os.getloadavg()[0])
    return {
        "bench": "train_step",
        "config": dataclasses.asdict(config),
        "machine": {**record.machine(), "load_average": busy},
        "versions": {**record.versions(), **timed.pop("peer_versions")},
        "figures": figures(config, timed["seconds"], timed["floor"], memory),
        **timed,
        "memory": memory,
    }


def figures(config: BenchConfig, seconds: dict[str, Any], floor: dict[str, float], memory: dict[str, Any]) -> Any:
    """The ratios, with the bound that each is held to."""

    def ratio(a: str, b: str) -> float | None:
        return seconds[a]["median"] / seconds[b]["median"] if a in seconds and b in seconds else None

    beyond = {side: value["beyond_base_bytes"] for side, value in memory.items()}
    values = {
        "tokens_per_second_against_peft": (ratio("peft", "lora"), "least", 1.3),
        "tokens_per_second_against_peft_with_our_malloc": (ratio("peft+malloc", "lora"), None, None),
        "qlora_tokens_per_second_against_peft_and_bitsandbytes": (ratio("peft+nf4", "qlora"), "least", 1.3),
        "qlora_step_against_lora_step": (ratio("qlora", "lora"), "most", 1.25),
        "lora_step_against_full_step": (ratio("lora", "full"), "most", 0.70),
        "lora_step_against_floor": (seconds["lora"]["median"] / floor["seconds"], "most", 1.6),
        "forward_with_adapters_against_without": (ratio("forward+lora", "forward"), "most", 1.10),
        "features_with_adapters_against_without": (ratio("features+lora", "features"), None, None),
        "memory_beyond_base_against_peft": (beyond["lora"] / beyond["peft"] if "peft" in beyond else None, "most", 1.0),
    }
    return {name: _figure(*value) for name, value in values.items()}


def _figure(value: float | None, kind: str | None, bound: float | None) -> dict[str, Any]:
    met = None if value is None or bound is None else value >= bound if kind == "least" else value <= bound
    return {"value": None if value is None else round(value, 4), "bound": kind and [kind, bound], "met": met}


def _ours() -> Worker:
    # With the settings that `lorax train` gives its own process.
    environment = {MARK: "1", "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", TUNABLE), "JAX_PLATFORMS": "cpu"}
    return Worker("lorax", [sys.executable, "-m", "lorax.bench.lorax_worker"], environment)


def _peer(python: str, malloc: bool) -> Worker:
    script = str(Path(__file__).with_name("peft_worker.py"))
    return Worker("PEFT", [python, script], {"GLIBC_TUNABLES": TUNABLE} if malloc else {"GLIBC_TUNABLES": ""})


@contextmanager
def _sides(config: BenchConfig, *, both_mallocs: bool) -> Iterator[dict[str, Worker]]:
    """The workers by name: ours, and those of the peer if there is one."""
    with ExitStack() as stack:
        sides = {"lora": stack.enter_context(_ours())}
        if config.peer_python is not None:
            sides["peft"] = stack.enter_context(_peer(config.peer_python, malloc=False))
            if both_mallocs:
                sides["peft+malloc"] = stack.enter_context(_peer(config.peer_python, malloc=True))
                sides["peft+nf4"] = stack.enter_context(_peer(config.peer_python, malloc=False))
        yield sides


def _load(config: BenchConfig, base: str, worker: Worker, name: str = "") -> dict[str, Any]:
    c = config
    more = {"quantised": True} if name == "peft+nf4" else {}
    return worker.ask(
        op="load", base=base, threads=c.threads, batch=c.batch_size, length=c.seq_len, seed=c.seed, **more
    )


def _prepare(config: BenchConfig, worker: Worker, what: str) -> dict[str, Any]:
    return worker.ask(op="prepare", what=what, rank=config.rank, alpha=config.alpha, lr=config.lr)


def _memories(config: BenchConfig, base: str) -> dict[str, Any]:
    """Each side in a process of its own: resident bytes with the base, and the peak over a few steps.

    The peak counts from after the first step, so that what a compiler needed is left out on both sides.
    """
    out = {}
    with _sides(config, both_mallocs=False) as sides:
        for name, worker in sides.items():
            loaded = _load(config, base, worker)
            prepared = _prepare(config, worker, "lora")
            worker.ask(op="reset_peak")
            for _ in range(MEMORY_STEPS):
                worker.ask(op="run", what="lora")
            peak = worker.ask(op="memory")["peak"]
            out[name] = {
                "with_base_bytes": loaded["rss"],
                "peak_bytes": peak,
                "beyond_base_bytes": peak - loaded["rss"],
                **{key: prepared[key] for key in ("temporary_bytes",) if key in prepared},
            }
    return out


def _times(config: BenchConfig, base: str) -> dict[str, Any]:
    with _sides(config, both_mallocs=True) as sides:
        loaded = {name: _load(config, base, worker, name) for name, worker in sides.items()}
        ready = {name: _prepare(config, worker, "lora") for name, worker in sides.items()}
        ours = {what: _prepare(config, sides["lora"], what) for what in OURS[1:]}
        _same(loaded, ready, ours["qlora"])
        turns = [(what, sides["lora"]) for what in OURS] + [(n, w) for n, w in sides.items() if n != "lora"]
        # The peer's turns come right after ours, not at the end of a long queue.
        turns.sort(key=lambda turn: turn[0] not in ("lora", "peft", "peft+malloc", "qlora", "peft+nf4"))
        times: dict[str, list[float]] = {name: [] for name, _ in turns}
        rates = []
        for _ in range(config.rounds):
            for name, worker in turns:
                time.sleep(PAUSE)
                times[name].append(worker.ask(op="run", what=name if worker is sides["lora"] else "lora")["seconds"])
            sizes = {"batch": config.batch_size, "length": config.seq_len, "rank": config.rank}
            rates.append(sides["lora"].ask(op="rates", least=0.01, **sizes))
    tokens = config.batch_size * config.seq_len
    seconds = {n: {"median": median(t), "least": min(t), "all": [round(x, 5) for x in t]} for n, t in times.items()}
    return {
        "seconds": seconds,
        "tokens_per_second": {n: tokens / seconds[n]["median"] for n in (*sides, "qlora")},
        "floor": _floor(rates),
        "loss": {**{name: value["loss"] for name, value in ready.items()}, "qlora": ours["qlora"]["loss"]},
        "parameters": {name: value["parameters"] for name, value in ready.items()},
        "peer_versions": loaded["peft+nf4"]["versions"] if "peft+nf4" in loaded else {},
    }


def _floor(rates: list[dict[str, float]]) -> dict[str, float]:
    """FLOPs of the step over the rate at which this machine does its products, each measured by itself."""
    rate, best = median(r["rate"] for r in rates), median(r["best_rate"] for r in rates)
    flops = rates[0]["flops"]
    return {
        "flops": flops,
        "rate": rate,
        "seconds": flops / rate,
        "best_rate": best,
        "seconds_at_best_rate": flops / best,
        "share_of_flops_timed": rates[0]["timed"],
    }


def _same(loaded: dict[str, dict[str, Any]], ready: dict[str, dict[str, Any]], qlora: Any = None) -> None:
    """Both sides must train as many numbers, on as many threads, from the same loss: then the weights are the same."""
    ours = loaded["lora"]
    for name, theirs in loaded.items():
        us, them = qlora if name == "peft+nf4" else ready["lora"], ready[name]
        if us["parameters"] != them["parameters"]:
            raise LoraxError(f"{name} trains {them['parameters']} parameters and lorax {us['parameters']}")
        if abs(us["loss"] - them["loss"]) > 2e-3 or ours["threads"] != theirs["threads"]:
            raise LoraxError(
                f"{name} starts at loss {them['loss']:.5f} on {theirs['threads']} threads and lorax at "
                f"{us['loss']:.5f} on {ours['threads']}: they do not compute the same thing"
            )
