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
from typing import Any, Literal

from lorax.bench import record
from lorax.bench.multi_worker import RANKS
from lorax.bench.protocol import Worker
from lorax.errors import LoraxError

PAUSE = 0.3


# What can be measured by itself: a slow machine measures one part at a time into one file.
PARTS = ("mixed", "banks", "tenants", "together", "alone", "peer-alone")


@dataclass(frozen=True)
class Knobs:
    """What this benchmark has beside the settings of all."""

    adapters: int = 32
    """multi: different adapters in the batch, on every linear map, ranks 4 to 64."""
    small: int = 5
    """multi: adapters of the small bank (queries and values)."""
    large: int = 1000
    """multi: adapters of the large bank (queries and values)."""
    tenants: int = 8
    """multi: adapters of the batch that PEFT runs as well."""
    train: int = 16
    """multi: adapters trained together; 0 leaves training out."""
    examples: int = 4
    """multi: examples of each adapter in a training step."""
    steps: int = 2
    """multi: steps of a training run."""
    runs: int = 5
    """multi: of the runs one after another, how many are timed (each has another rank); their mean stands for each."""
    peer_runs: int = 2
    """multi: the same for runs of PEFT."""
    parts: tuple[Literal["mixed", "banks", "tenants", "together", "alone", "peer-alone"], ...] = PARTS
    """multi: what is measured; with --out, added to what was measured there with the same settings."""


@dataclass(frozen=True)
class MultiConfig(Knobs):
    """What is measured."""

    base: str = "smollm2-135m"
    """The base model."""
    batch_size: int = 32
    """Examples of a forward."""
    seq_len: int = 64
    """Tokens of an example."""
    rounds: int = 5
    """Times that every forward takes its turn."""
    threads: int = 0
    """Cores that each side may use; 0 is all of this process's."""
    peer_python: str | None = None
    """A Python with torch, transformers and peft; without it only our own times are taken."""
    seed: int = 0
    """Draws tokens."""

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            LoraxError: names the setting.
        """
        for name in ("batch_size", "seq_len", "adapters", "small", "large", "tenants", "rounds", "steps", "runs"):
            if getattr(self, name) < 1:
                raise LoraxError(f"bench multi: {name} is {getattr(self, name)}: must be at least 1")
        if self.large % len(RANKS):
            raise LoraxError(
                f"bench multi: large is {self.large}: must be a multiple of {len(RANKS)}, the ranks in turn"
            )
        if not self.parts:
            raise LoraxError(f"bench multi: parts is empty; name some of {', '.join(PARTS)}")


def run(config: MultiConfig) -> dict[str, Any]:
    """Measure, and return everything as plain data: `figures`, `seconds`, `training`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: a setting that cannot be, or a side that does not run.
    """
    config.check()
    busy, threads = os.getloadavg()[0], config.threads or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with _ours() as worker:
            worker.ask(op="save", base=config.base, folder=folder)
        load = {"base": folder, "threads": threads, "batch": config.batch_size, "length": config.seq_len}
        sides, loaded = {}, {}
        for name, start in (("lorax", _ours), ("PEFT", lambda: _peer(str(config.peer_python)))):
            if name == "lorax" or config.peer_python is not None:
                begin = time.perf_counter()
                sides[name] = stack.enter_context(start())
                loaded[name] = sides[name].ask(op="load", seed=config.seed, **load)
                loaded[name]["ready"] = time.perf_counter() - begin
        times, about = _forwards(config, sides)
        training = _training(config, sides, {name: value["ready"] for name, value in loaded.items()})
    seconds = {name: {"median": median(t), "least": min(t)} for name, t in times.items()}
    return {
        "bench": "multi",
        "config": {**asdict(config), "threads": threads, "parts": list(config.parts)},
        "machine": {**record.machine(), "load_average": busy},
        "versions": {**record.versions(), **loaded.get("PEFT", {}).get("versions", {})},
        "bank": about,
        "figures": figures(config, seconds, training),
        "seconds": {**seconds, **_totals(config, training)},
        "training": training,
    }


def _ours() -> Worker:
    return Worker("lorax", [sys.executable, "-m", "lorax.bench.multi_worker"], {"JAX_PLATFORMS": "cpu"})


def _peer(python: str) -> Worker:
    return Worker("PEFT", [python, str(Path(__file__).with_name("peft_multi_worker.py"))])


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Two results of the same settings as one: the later parts in the place of the same earlier ones.

    Raises:
        LoraxError: they are of other settings, or of another machine; names the first that differs.
    """
    first, second = ({**x["config"], "processor": x["machine"]["processor"]} for x in (before, now))
    # How often a part was timed is its own affair, and so is a peer that it did not need.
    for name in sorted(set(first) - {"parts", "peer_python", "rounds", "runs", "peer_runs"}):
        if first[name] != second.get(name):
            raise LoraxError(f"--out: holds a result with {name}={first[name]}, and this one has {second.get(name)}")
    config = {**now["config"], "parts": list(dict.fromkeys([*first["parts"], *second["parts"]]))}
    config["peer_python"] = second["peer_python"] or first["peer_python"]
    out = {key: {**before[key], **now[key]} for key in ("bank", "seconds", "training", "versions")}
    fresh = MultiConfig(**{**config, "parts": tuple(config["parts"])})
    return {**now, **out, "config": config, "figures": figures(fresh, out["seconds"], out["training"])}


def _forwards(config: MultiConfig, sides: dict[str, Worker]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Groups one after the other, so that the banks of one are given back before the next one's are made."""
    groups = {
        "mixed": [("lorax", "base", 0, "all"), ("lorax", "mixed", config.adapters, "all")],
        "tenants": [("lorax", "tenants", config.tenants, "all"), ("PEFT", "mixed", config.tenants, "all")],
        "banks": [("lorax", "small bank", config.small, "few"), ("lorax", "large bank", config.large, "few")],
    }
    times: dict[str, list[float]] = {}
    about: dict[str, Any] = {}
    for part, turns in groups.items():
        if part not in config.parts:
            continue
        group = [turn for turn in turns if turn[0] in sides]
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


def _training(config: MultiConfig, sides: dict[str, Worker], ready: dict[str, float]) -> dict[str, Any]:
    """Runs by name: seconds of the whole, of the first step (compiling), of a later one; what a process needs before
    (`ready`: imports, the base); and the last losses.
    """
    if not config.train:
        return {}
    shape = {"adapters": config.train, "examples": config.examples, "length": config.seq_len}
    shape |= {"steps": config.steps, "seed": config.seed}
    out: dict[str, Any] = {}
    if "together" in config.parts:
        out["lorax: together"] = sides["lorax"].ask(op="together", **shape)
    if "alone" in config.parts:
        out["lorax: one after another"] = _mean(sides["lorax"], min(config.runs, config.train), shape)
    if "peer-alone" in config.parts and "PEFT" in sides and config.peer_runs:
        out["PEFT: one after another"] = _mean(sides["PEFT"], min(config.peer_runs, config.train), shape)
    if "together" in config.parts and "alone" in config.parts:
        for mine, own in zip(out["lorax: together"]["losses"], out["lorax: one after another"]["losses"], strict=False):
            if abs(mine - own) > 1e-3 * abs(own):
                raise LoraxError(f"trained together the loss is {mine}, alone {own}: not the same thing")
    return {name: {**found, "ready": ready[name.split(":")[0]]} for name, found in out.items()}


def _mean(side: Worker, runs: int, shape: dict[str, Any]) -> dict[str, Any]:
    found = [side.ask(op="alone", which=i, **shape) for i in range(runs)]
    means = {key: sum(run[key] for run in found) / runs for key in ("seconds", "first", "step")}
    return {**means, "runs": runs, "losses": [run["loss"] for run in found]}


def _totals(config: MultiConfig, training: dict[str, Any]) -> dict[str, Any]:
    """All runs' seconds, those that were not timed at the mean of those that were; and with a process for each run."""
    out = {}
    for name, found in training.items():
        times = 1 if name.endswith("together") else config.train
        for label, one in ((name, found["seconds"]), (f"{name}, launched", found["seconds"] + found["ready"])):
            out[label] = {"median": one * times, "least": one * times}
    return out


def figures(config: MultiConfig, seconds: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """The ratios, with the bound that each is held to."""
    seconds = {**seconds, **_totals(config, training)}

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
        # As people run them: a process for each, which imports and reads the base before it compiles.
        f"{config.train}_launches_against_together": (
            ratio("lorax: one after another, launched", "lorax: together, launched"),
            None,
            None,
        ),
        f"{config.train}_launches_of_PEFT_against_together": (
            ratio("PEFT: one after another, launched", "lorax: together, launched"),
            None,
            None,
        ),
    }
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": None if bound is None else [kind, bound],
            "met": None if value is None or bound is None else value <= bound if kind == "most" else value >= bound,
        }
        for name, (value, kind, bound) in rows.items()
    }
