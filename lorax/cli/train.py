"""`lorax train`: fine-tune a base model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from lorax.cli.output import figures, measures, output_is_ours, print_json, print_table
from lorax.errors import LoraxError
from lorax.train.config import TrainConfig


@dataclass(frozen=True)
class Args:
    """Fine-tune a base model on a demo task or on your own JSONL, with loss on the completion only.

    Example: lorax train --task medical --steps 40 --batch-size 16 --rank 16 --lr 1e-3
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    out: str | None = None
    """The run's folder; runs/<task or data>-<method> by default, numbered when that is taken."""
    resume: bool = False
    """Continue the run in --out; settings that are not given are those that it began with."""
    mesh: str | None = None
    """Axes over all devices: data=4,model=2. data (or fsdp) splits batch and weights, replica the batch alone, model
    the arithmetic. Without it one device, or with several processes as much data as the batch has rows."""
    distributed: bool = False
    """One of several processes that run this same command, found through a TPU pod, GKE, Slurm, MPI, or the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. --out must be a folder that all of them see."""
    coordinator: str | None = None
    """host:port of process 0, where nothing tells; with --processes and --process-id."""
    processes: int | None = None
    """How many processes run this command."""
    process_id: int | None = None
    """This one's number, from 0."""
    json: bool = False
    """Print the report as JSON, and no progress."""

    def run(self, words: Sequence[str]) -> None:
        if self.resume and not self.out:
            raise LoraxError("--resume: say which run with --out runs/<name>")
        if self.out == "":
            raise LoraxError("--out: is empty; name a folder, or leave it out")
        config = self._recorded(words) if self.resume else self.config
        config.check()
        if self.distributed or self.coordinator or self.processes is not None or self.process_id is not None:
            self._run_among_others(config)
            return
        # Heavy imports wait until the settings are known to be good.
        from lorax.train.progress import Display
        from lorax.train.runner import run
        from lorax.train.runtime import keep_compiled_programs

        out = Path(self.out) if self.out else _free_folder(config)
        keep_compiled_programs()
        report = run(config, out, resume=self.resume, display=Display(quiet=self.json), mesh=self._mesh(config))
        print_json(report) if self.json else _show(report, out)

    def _mesh(self, config: TrainConfig) -> Any:
        """The devices; without --mesh a single process has one."""
        import lorax.distributed as pod

        if self.mesh is None and pod.process_count() == 1:
            return None
        return pod.make_mesh(self.mesh, config.batch_size)

    def _run_among_others(self, config: TrainConfig) -> None:
        """The same run as one of several processes: process 0 speaks, all leave together."""
        if not self.out:
            raise LoraxError("--out: name the run's folder, one that every process sees")
        import lorax.distributed as pod
        from lorax.train.progress import Display, silent
        from lorax.train.runner import run
        from lorax.train.runtime import keep_compiled_programs

        keep_compiled_programs()
        with output_is_ours():
            pod.initialize(self.coordinator, self.processes, self.process_id)
        show = Display(quiet=self.json) if pod.is_main() else silent()
        with leave_if_lost(), pod.together(), output_is_ours():
            report = run(config, Path(self.out), resume=self.resume, display=show, mesh=self._mesh(config))
        if pod.is_main():
            print_json(report) if self.json else _show(report, Path(self.out))

    def _recorded(self, words: Sequence[str]) -> TrainConfig:
        """This command's settings, with those of the run in `out` where the command line is silent.

        A setting that was given and differs stays, so that `run` can refuse it by name.
        """
        record = Path(str(self.out)) / "run.json"
        if not record.exists():
            if self.config.task is None and self.config.data is None:
                raise LoraxError(
                    f"{self.out}: holds no run to resume; name its folder, or begin one with --task or --data"
                )
            return self.config
        from lorax.train.record import read_json

        began = config_from(read_json(record).get("config"), record)
        again = tyro.cli(Args, prog="lorax train", args=list(words), default=Args(config=began))
        return again.config


@contextlib.contextmanager
def leave_if_lost() -> Iterator[None]:
    """Leave at once where another process is gone: an ordinary exit would wait for it."""
    from lorax.distributed import Lost

    try:
        yield
    except Lost as error:
        print(f"lorax: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def config_from(recorded: Any, place: Path) -> TrainConfig:
    """The settings that a `run.json` holds.

    Raises:
        LoraxError: they are not settings of this version.
    """
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    if not isinstance(recorded, dict) or set(recorded) != names:
        odd = sorted(set(recorded if isinstance(recorded, dict) else ()) ^ names)
        raise LoraxError(f"{place}: its settings are not those of this version of lorax ({', '.join(odd[:3])})")
    kinds = get_type_hints(TrainConfig)
    for name, value in recorded.items():
        if not _fits(value, kinds[name]):
            raise LoraxError(f"{place}: its setting {name} is {str(value)[:60]!r}; the run's record is damaged")
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in recorded.items()}
    return TrainConfig(**settings)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a setting's type."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if inner:
        return any(_fits(value, one) for one in inner)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _free_folder(config: TrainConfig) -> Path:
    stem = config.task or Path(str(config.data)).stem
    name, number = Path("runs") / f"{stem}-{config.method}", 1
    folder = name
    while folder.exists():
        number += 1
        folder = name.with_name(f"{name.name}-{number}")
    return folder


def _show(report: dict[str, Any], out: Path) -> None:
    held_out = report["eval"]
    rows = [
        (label, *figures(held_out[key]))
        for label, key in (("base model", "before"), ("majority class", "majority"), ("fine-tuned", "after"))
        if held_out.get(key)
    ]
    title = f"{report['data']['name']}: {report['data']['eval_items']} held-out examples"
    config = report["run"]["config"]
    head, loss = config.get("head", "lm"), config.get("loss", "sft")
    kind = measures(head != "lm", head == "regression", loss == "dpo")
    print_table(kind, rows, title)
    adapter, train = report["adapter"], report["train"]
    print(f"{adapter['parameters']:,} parameters trained at {train['tokens_per_second']:,.0f} tokens/s")
    print(f"saved in {out}: {Path(adapter['path']).name}/, metrics.jsonl, loss.png, report.json")
