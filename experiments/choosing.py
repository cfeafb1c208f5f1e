"""Which way to fine-tune? Every way at its own best learning rate, on the demo tasks, in one table.

    python experiments/choosing.py --budget small --out experiments/results/choosing-small
    python experiments/choosing.py --budget whole --out experiments/results/choosing-whole

Each arm is one run of `lorax train` in a process of its own: a way, a task, a learning rate, a seed. What it found is
one line of OUT/ledger.jsonl; started again, the script goes on with the arms that have none. `--minutes` ends it.
OUT/summary.json and OUT/summary.md hold the best learning rate of each way by held-out loss, over the arms that were
run, and say how many were not; OUT/rates.png has the losses over the learning rates.

    task score        exact match on held-out items after training, and their loss
    forgetting        loss after minus before on general text, and on the tasks that were not trained for
    size              trained parameters, bytes of the files that hold what was learnt
    cost              peak resident memory of the process, seconds of a step (median of those that compiled nothing)
    change            ||dW||_F / ||W||_F over all weights

The budgets differ in steps, items, tasks, ways and seeds, never in what is measured. `whole` is what the question asks
for: ten ways, three tasks, four learning rates, two seeds; 240 runs, days on two cores. `small` is what two cores do in
an hour: one task, one seed, a dozen steps. A dozen steps say which ways learn fast and at which rate, not which are
best in the end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import tyro

FACTORS = (1e-4, 3e-4, 1e-3, 3e-3)
WHOLE = (1e-5, 3e-5, 1e-4, 3e-4)

# way -> (settings of the run, learning rates)
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"method": "full"}, WHOLE),
    "head": ({"method": "head"}, FACTORS),
    "last-2": ({"method": "last-k", "last_k": 2}, WHOLE),
    "lora-1": ({"rank": 1}, FACTORS),
    "lora-4": ({"rank": 4}, FACTORS),
    "lora-16": ({"rank": 16}, FACTORS),
    "lora-64": ({"rank": 64}, FACTORS),
    "rslora-64": ({"rank": 64, "scaling": "rslora"}, FACTORS),
    "dora-16": ({"rank": 16, "variant": "dora"}, FACTORS),
    "pissa-16": ({"rank": 16, "init": "pissa-fast"}, FACTORS),
}


@dataclass(frozen=True)
class Budget:
    """What is run. items: held-out examples of the task; elsewhere: of each set that measures forgetting."""

    tasks: tuple[str, ...]
    ways: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    items: int
    elsewhere: int
    base: str = "smollm2-135m"


BUDGETS = {
    "whole": Budget(("medical", "legal", "code"), tuple(WAYS), (0, 1), 200, 16, 300, 100),
    "small": Budget(("medical",), ("lora-16", "full", "last-2", "head"), (0,), 12, 8, 48, 8),
}


@dataclass(frozen=True)
class Arm:
    """One run."""

    task: str
    way: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.way}/{self.lr:g}/{self.seed}"


@dataclass(frozen=True)
class Args:
    """Run the arms that have not been run, and sum up."""

    budget: Literal["whole", "small"] = "small"
    """How much is run."""
    out: Path = Path("runs/choosing")
    """The folder of the ledger and the summary."""
    minutes: float = math.inf
    """Begin no further arm after so many minutes."""
    only: tuple[str, ...] = ()
    """Ways to run, out of the budget's."""
    arm: str | None = None
    """Run this arm alone, TASK/WAY/RATE/SEED, in this process, and print its row: how the script runs itself."""


def arms(budget: Budget) -> Iterator[Arm]:
    """All runs of a budget: every way at one rate before any at the next, the middle rates first."""
    for seed in budget.seeds:
        for place in (2, 1, 3, 0):
            for task in budget.tasks:
                for way in budget.ways:
                    yield Arm(task, way, WAYS[way][1][place], seed)


def main(args: Args) -> None:
    """See the module."""
    budget = BUDGETS[args.budget]
    if args.only:
        budget = replace(budget, ways=tuple(way for way in budget.ways if way in args.only))
    if args.arm is not None:
        task, way, lr, seed = args.arm.split("/")
        print(json.dumps(run_arm(budget, Arm(task, way, float(lr), int(seed)), args.out)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for arm in arms(budget):
        if arm.name in {row["arm"] for row in read(args.out)}:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            break
        row = in_own_process(args, arm)
        with (args.out / "ledger.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{arm.name}: loss {row['loss']:.3f}, exact match {row['accuracy']:.3f}, {row['wall_seconds']:.0f} s")
    everything = list(arms(BUDGETS[args.budget]))
    summarise(args, read(args.out), everything)


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of the ledger; a line cut short by a kill is none."""
    path, rows = out / "ledger.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def in_own_process(args: Args, arm: Arm) -> dict[str, Any]:
    """The arm's row, with the peak memory of the process that made it."""
    words = [sys.executable, __file__, "--budget", args.budget, "--out", str(args.out), "--arm", arm.name]
    began = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arm.name}: ended with exit code {process.returncode}")
    # Linux counts kilobytes.
    peak = usage.ru_maxrss * 1024
    return json.loads(said.splitlines()[-1]) | {
        "peak_bytes": peak,
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def run_arm(budget: Budget, arm: Arm, out: Path) -> dict[str, Any]:
    """Train, then measure what the table needs."""
    from lorax import merge
    from lorax.cli.source import find, open_model
    from lorax.models import load
    from lorax.train import TrainConfig, run
    from lorax.train.methods import untied
    from lorax.train.runtime import keep_compiled_programs

    keep_compiled_programs()
    settings, _ = WAYS[arm.way]
    train, held_out = files(budget, arm.task, out)
    common: dict[str, Any] = {"base": budget.base, "data": str(train), "eval_data": str(held_out), "lr": arm.lr}
    common |= {"seed": arm.seed, "steps": budget.steps, "batch_size": budget.batch, "eval_items": budget.items}
    common |= {"schedule": "linear", "warmup": max(1, budget.steps // 10), "save_every": 10**6}
    folder = out / "work" / arm.name.replace("/", "-")
    report = run(TrainConfig(**{**common, **settings}), folder, resume=folder.exists())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [step["seconds"] for step in steps if not step["compiled"]]
    model, params = open_model(find(None, str(folder)))
    base = load(budget.base)
    plain = base.params if base.config.tie_embeddings == model.config.tie_embeddings else untied(base).params
    after, found = report["eval"]["after"], elsewhere(budget, arm, out, base, (model, params))
    row = {
        "arm": arm.name,
        **asdict(arm),
        "accuracy": after["accuracy"],
        "loss": after["loss"],
        "before": report["eval"]["before"],
        "forgetting": found,
        "parameters": report["adapter"]["parameters"],
        "bytes": sum(p.stat().st_size for p in Path(report["adapter"]["path"]).glob("*.safetensors")),
        "step_seconds": median(seconds) if seconds else None,
        "change": change(plain, merge(params)),
        "steps": budget.steps,
    }
    shutil.rmtree(folder)  # a whole model for each arm would fill the disk
    return row


def files(budget: Budget, task: str, out: Path) -> tuple[Path, Path]:
    """One pass of the task's training items for these steps, and its held-out items, as JSONL."""
    from lorax.data import demo

    found, written = demo(task), []
    parts = (("train", found.train[: budget.steps * budget.batch]), ("held-out", found.heldout[: budget.items]))
    for name, records in parts:
        path = out / "work" / f"{task}-{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"messages": [*r.prompt, {"role": "assistant", "content": r.completion}]} for r in records]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written.append(path)
    return written[0], written[1]


def elsewhere(budget: Budget, arm: Arm, out: Path, base: Any, after: tuple[Any, Any]) -> dict[str, float]:
    """Loss after minus before on general text and on the other tasks. The base's losses are computed once."""
    from lorax.analysis.forgetting import sets
    from lorax.data.demos import TASKS
    from lorax.train import evaluate, make_scorer

    others = [task for task in TASKS if task != arm.task]
    over = sets(base.tokenizer, others, items=budget.elsewhere, batch_size=8)
    kept = out / "work" / "base.json"
    before: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [name for name in over if name not in before]
    if missing:
        scorer = make_scorer(base)
        before |= {name: evaluate(scorer, base.params, over[name].batches()).loss for name in missing}
        kept.write_text(json.dumps(before))
    model, params = after
    scorer = make_scorer(model)
    return {name: evaluate(scorer, params, data.batches()).loss - before[name] for name, data in over.items()}


def change(before: Any, after: Any) -> float:
    """||after - before||_F / ||before||_F over all weights."""
    import jax
    import numpy as np

    moved = whole = 0.0
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        a, b = np.asarray(one, np.float32), np.asarray(two, np.float32)
        moved += float(np.square(b - a).sum(dtype=np.float64))
        whole += float(np.square(a).sum(dtype=np.float64))
    return math.sqrt(moved / whole)


def summarise(args: Args, rows: Sequence[dict[str, Any]], wanted: Sequence[Arm]) -> None:
    """The best rate of each way on each task, as JSON and as a table, and the picture."""
    groups: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["task"], row["way"]][row["lr"]].append(row)
    best = []
    for (task, way), by_rate in groups.items():
        lr, found = min(by_rate.items(), key=lambda item: mean(row["loss"] for row in item[1]))
        figures = {
            name: mean(row[name] for row in found) for name in ("accuracy", "loss", "parameters", "bytes", "change")
        }
        timed = [row["step_seconds"] for row in found if row["step_seconds"] is not None]
        general = mean(row["forgetting"]["general"] for row in found)
        others = mean(value for row in found for name, value in row["forgetting"].items() if name != "general")
        more = {"rates": len(by_rate), "seeds": len(found), "general": general, "other_tasks": others}
        more |= {"peak_bytes": max(row["peak_bytes"] for row in found), "step_seconds": mean(timed) if timed else None}
        best.append({"task": task, "way": way, "lr": lr, **figures, **more})
    best.sort(key=lambda row: (row["task"], row["loss"]))
    done = {row["arm"] for row in rows}
    missing = [arm.name for arm in wanted if arm.name not in done]
    command = f"python experiments/choosing.py --budget {args.budget} --out {args.out.as_posix()}"
    summary = {"command": command, "budget": asdict(BUDGETS[args.budget]), "run": len(done), "missing": missing}
    before = {row["task"]: row["before"] for row in rows}
    (args.out / "summary.json").write_text(json.dumps(summary | {"before": before, "best": best}, indent=1) + "\n")
    (args.out / "summary.md").write_text(table(best, before, command, len(done), len(wanted)))
    if rows:
        picture(args.out / "rates.png", groups)


def table(best: list[dict[str, Any]], before: dict[str, Any], command: str, run: int, wanted: int) -> str:
    """The summary for people."""
    lines = [f"`{command}`: {run} of {wanted} runs of this budget have been made.", ""]
    for task, found in before.items():
        lines.append(f"{task}, before: exact match {found['accuracy']:.3f}, loss {found['loss']:.3f}")
    names = ("task", "way", "best rate", "rates tried", "exact match", "loss", "general", "other tasks", "parameters")
    names += ("bytes", "peak GB", "step s", "change")
    lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in best:
        step = "-" if row["step_seconds"] is None else f"{row['step_seconds']:.2f}"
        cells = (
            row["task"],
            row["way"],
            f"{row['lr']:g}",
            row["rates"],
            f"{row['accuracy']:.3f}",
            f"{row['loss']:.3f}",
        )
        cells += (f"{row['general']:+.3f}", f"{row['other_tasks']:+.3f}", f"{row['parameters']:,.0f}")
        cells += (f"{row['bytes']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}", step, f"{row['change']:.2e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def picture(path: Path, groups: Any) -> None:
    """Held-out loss over the learning rate: a line for each way, a panel for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({task for task, _ in groups})
    figure = Figure(figsize=(5.5 * len(tasks), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for (_, way), by_rate in (item for item in groups.items() if item[0][0] == task):
            rates = sorted(by_rate)
            axes.semilogx(rates, [mean(row["loss"] for row in by_rate[lr]) for lr in rates], marker="o", label=way)
        axes.set(xlabel="learning rate", ylabel="held-out loss, nats per token", title=task)
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
