"""A whole run in a folder: before, train, after, and everything that lets it be resumed, read and repeated.

runs/<name>/
    run.json         settings, versions, git state, data hash: written first, checked on resume
    metrics.jsonl    one row per step
    checkpoints/     the newest two
    adapter/         what was learned, in PEFT's format (or `model/`, for methods that have no adapter)
    loss.png  report.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from lorax import extract, join, rebase, split
from lorax.data import TrainStream
from lorax.distributed import any_process, barrier, from_main, is_main, on_main, process_count
from lorax.errors import LoraxError
from lorax.io import atomic
from lorax.models import load, with_labels
from lorax.models.resolve import cache_dir
from lorax.train import methods
from lorax.train.checkpoint import Checkpoints
from lorax.train.config import TrainConfig, same_run
from lorax.train.dataset import Dataset, prepare
from lorax.train.evaluation import evaluate
from lorax.train.features import FeatureStream, HeldOutFeatures, cached
from lorax.train.interrupt import Asked, Interruptible
from lorax.train.loop import Diverged, Row, fit
from lorax.train.objective import loss_for, make_optimizer, scorer_for
from lorax.train.outcome import base_figures, build_report, save_result
from lorax.train.plot import plot_loss
from lorax.train.progress import Display
from lorax.train.receipts import Receipt, coverage, unmoved
from lorax.train.record import MetricsLog, NoLog, environment, read_json
from lorax.train.schedule import Schedule
from lorax.train.step import State, make_step
from lorax.train.where import Where

# Folded into the seed's key for a new head, so that it is not drawn as the factors are.
HEAD = 0x68656164


def run(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    display: Display | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Fine-tune as `config` says, in the folder `out`.

    Over several processes (`lorax.distributed.initialize` first) all of them call this alike, with a folder that all of
    them see; process 0 writes what is written once.

    Args:
        config: the settings.
        out: the run's folder; made if it is not there.
        resume: continue from the newest whole checkpoint in `out`, to the same bits as if nothing had
            happened. With nothing there yet the run starts at the beginning.
        display: where progress goes; none by default.
        mesh: the devices, from `lorax.distributed.make_mesh`; by default one. A resumed run may have another mesh, and
            then goes on to the same weights but for the order of sums.

    Returns:
        The report, as in `report.json`.

    Raises:
        LoraxError: bad settings or data, `out` holds a run and `resume` is False, the settings of the run in
            `out` differ, the loss diverged, a target never moved, or the disk is full.
        KeyboardInterrupt: Ctrl-C; a checkpoint was saved.
    """
    config.check()
    methods.check_base(config)
    where = Where(mesh)
    where.check(config)
    show = display or Display(quiet=True)
    done = _claim(config, out, resume, show)
    barrier("lorax: every process has looked at the folder")
    if done is not None:
        return done
    with show, Interruptible(show.say) as stop:
        return _Run(config, out, show, stop, where, **_setup(config, out, show, where)).go()


def _claim(config: TrainConfig, out: Path, resume: bool, show: Display) -> dict[str, Any] | None:
    """Check that `out` may be written; the report if that run is finished already."""
    record = out / "run.json"
    if not record.exists():
        # A run that was killed before it had written its record may have left a file whose name begins with a dot.
        if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
            raise LoraxError(f"{out}: is there and holds no run; name another --out, which a run has to itself")
        if resume:
            show.say(f"{out}: holds no run yet, starting at the beginning")
        return None
    if not resume:
        raise LoraxError(f"{out}: holds a run already; continue it with --resume or choose another --out")
    same_run(read_json(record).get("config", {}), config.as_json(), out)
    report = out / "report.json"
    if report.exists():
        show.say(f"{out}: this run is finished; nothing to resume")
        return read_json(report)
    return None


def _setup(config: TrainConfig, out: Path, show: Display, where: Where) -> dict[str, Any]:
    """Load the base and the data, and write the record; the same data is required of a resumed run."""
    with where.loading():
        base = load(config.base, jnp.dtype(config.dtype), config.remat, config.quantised)
        _check_head(config, base.config)
        data = prepare(config, base.tokenizer, show.say, base.config.labels)
        about = {"data": data.sha256, "base": _fingerprint(base.params)}
        if data.labels and not base.config.labels:
            key = jax.random.fold_in(jax.random.key(config.seed), HEAD)
            base = with_labels(base, data.labels, key, regression=config.head == "regression")
        model, params = methods.adapted(base, config, data.text)
    stream: Any = data.stream(config)
    stream.rows = where.rows(config.batch_size)
    per_epoch = stream.batches_per_epoch / config.accumulate
    steps = config.steps or max(1, round(config.epochs * per_epoch))
    optimizer, rate = make_optimizer(config, steps)
    record = out / "run.json"
    if from_main(record.exists()):
        before = read_json(record)
        for what in about:
            if before.get("sha256", {}).get(what) != about[what]:
                raise LoraxError(f"{out}: the {what} is not what the run began with; cannot resume on another {what}")
    else:
        began = {"config": config.as_json(), "steps": steps, "sha256": about, "environment": environment()}
        on_main(lambda: atomic.write_json(record, began))
    if where.mesh is None and methods.only_head(split(params)[0]) and config.loss == "sft":
        stream, held_out = _by_features(config, base, data, stream, about, show)
        data = dataclasses.replace(data, held_out=held_out)
    # The model is code from here on: its parameters live in `params`, some of them structured.
    model = dataclasses.replace(where.model(model), params={})
    return {
        "model": model,
        "params": params,
        "data": data,
        "stream": stream,
        "steps": steps,
        "optimizer": optimizer,
        "rate": rate,
    }


def _check_head(config: TrainConfig, base: Any) -> None:
    """Whether the base is of the kind that the settings train.

    Raises:
        LoraxError: a classifier where text is learnt, or one of the other kind.
    """
    have = "lm" if not base.labels else "regression" if base.regression else "classification"
    if have not in ("lm", config.head):
        raise LoraxError(f"{config.base}: its head is for {have}; train it with --head {have}")


def _by_features(
    config: TrainConfig, base: Any, data: Dataset, stream: TrainStream, about: dict[str, str], show: Display
) -> tuple[FeatureStream, Any]:
    """The stream and the held-out part with the trunk's features in the place of tokens, each computed once."""
    parts = {"train": data.train, "held-out": data.held_out.examples}
    begun: set[str] = set()

    def tick(part: str, rows: int) -> None:
        if part not in begun:
            begun.add(part)
            show.begin(f"features {part}", len(parts[part]))
        show.advance(rows)

    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    key = {**about, "dtype": config.dtype, "quantised": repr(config.quantised)}
    found = cached(base, parts, key, cache_dir() / "features", **sizes, tick=tick)
    return FeatureStream(stream, found["train"]), HeldOutFeatures(found["held-out"], config.batch_size)


def _fingerprint(params: PyTree) -> str:
    """A hash of a few numbers of every weight: tells one base from another without reading all of it."""
    import hashlib

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:1024] if leaf.ndim else leaf).tobytes())
    return digest.hexdigest()


@dataclass
class _Run:
    """The moving parts of `run`, so that each phase is a short method."""

    config: TrainConfig
    out: Path
    show: Display
    stop: Interruptible
    where: Where
    model: Any
    params: PyTree
    data: Dataset
    stream: TrainStream | FeatureStream
    steps: int
    optimizer: optax.GradientTransformation
    rate: Schedule
    evals: list[dict[str, Any]] = field(default_factory=list)

    def go(self) -> dict[str, Any]:
        state = self._begin()
        with contextlib.closing(self.log):
            if not self.evals:
                self._evaluate(0, state.trainable)
                self._save(state)
            if self._due(int(state.step)):
                self._evaluate(int(state.step), state.trainable)
            state = self._train(state)
        if self.evals[-1]["step"] != self.steps:
            self._evaluate(self.steps, state.trainable)
        return self._finish(state)

    def _begin(self) -> State:
        """The state to start from: fresh, or the newest whole checkpoint with its data position."""
        config = self.config
        self.start = extract(self.params) if config.moves_base else None
        trainable, self.frozen = split(self.where.params(self.params))
        state = self.where.state(trainable, self.optimizer, config.seed)
        self.params = None  # the state has its own copy of what trains; the first one can go
        head_trains = methods.head_trains(trainable, self.model.config)
        loss = loss_for(self.model, config, head_trains=head_trains, groups=self.where.parts)
        self.step = make_step(loss, self.optimizer)
        self.scorer = self.where.scorer(scorer_for(self.model, config))
        self.checkpoints = Checkpoints(self.out / "checkpoints", say=self.show.say)
        restored = self.checkpoints.restore(state)
        if restored is not None:
            state, meta = restored
            self.checkpoints.drop_after(int(state.step))
            self.stream.restore(meta["data"])
            self.evals = meta["evals"]
        self.log = MetricsLog(self.out / "metrics.jsonl", upto=int(state.step)) if is_main() else NoLog()
        return state

    def _train(self, state: State) -> State:
        self.show.begin("train", self.steps, done=int(state.step))
        try:
            return fit(
                self.step,
                state,
                self.frozen,
                self.stream,
                steps=self.steps,
                rate=self.rate,
                accumulate=self.config.accumulate,
                place=lambda batch: self.where.batch(batch, self.config.batch_size),
                after=self._after,
            )
        except Diverged as error:
            last = self.checkpoints.latest()
            raise Diverged(
                f"{error}; the last good checkpoint is {last}; "
                f"try a lower --lr (now {self.config.lr:g}), more --warmup, or look at the data of that step"
            ) from None

    def _after(self, state: State, row: Row) -> None:
        """After each step: log it, evaluate and save when due, and leave when asked to."""
        config = self.config
        self.log.add(row._asdict())
        self.show.stepped(row)
        last = row.step == self.steps
        self.stop.asked = any_process(self.stop.asked)  # all leave, or none
        if self._due(row.step) and not self.stop.asked:
            with contextlib.suppress(Asked):  # leave below, with the step saved; a resumed run evaluates it again
                self._evaluate(row.step, state.trainable)
            self.show.begin("train", self.steps, done=row.step)
        if last or row.step % config.save_every == 0 or self.stop.asked:
            self._save(state)
        self.stop.check()

    def _due(self, step: int) -> bool:
        """Whether an evaluation during the run is to be made after this step."""
        every = self.config.eval_every
        return bool(every) and step % every == 0 and self.evals[-1]["step"] < step < self.steps

    def _save(self, state: State) -> None:
        self.log.sync()
        self.checkpoints.save(state, {"data": self.stream.state(), "evals": self.evals})

    def _evaluate(self, step: int, trainable: PyTree) -> None:
        self.show.begin(f"eval @{step}", len(self.data.held_out))
        began = time.perf_counter()
        params = join(trainable, self.frozen)
        found = evaluate(self.scorer, params, self.data.held_out.batches(), tick=self._tick)
        seconds = time.perf_counter() - began
        self.evals.append({"step": step, **found._asdict(), "seconds": round(seconds, 3)})

    def _tick(self, items: int) -> None:
        self.show.advance(items)
        if process_count() == 1:  # of several, none may leave the others in the middle
            self.stop.check()

    def _finish(self, state: State) -> dict[str, Any]:
        state = self.where.trained(state)
        receipts = coverage(state)
        params = self.where.whole(join(state.trainable, self.frozen))
        report, fault = on_main(lambda: self._write(state, params, receipts)), unmoved(receipts)
        if fault:
            raise LoraxError(f"{fault} (the run is saved in {self.out})")
        return report

    def _write(self, state: State, params: PyTree, receipts: list[Receipt]) -> dict[str, Any]:
        if self.start is not None:
            # The base that was trained over is nobody else's: what is saved goes over the one with the name.
            params = rebase(params, self.start, load(self.config.base, jnp.dtype(self.config.dtype)).params)
        saved = save_result(self.out, self.model, params, self.config)
        plot_loss(self.out / "loss.png", self.log.rows, self.evals, f"{self.config.method} on {self.data.name}")
        report = build_report(
            self.config,
            self.data,
            self.log.rows,
            self.evals,
            receipts,
            state,
            saved,
            base_figures(params),
            read_json(self.out / "run.json"),
        )
        atomic.write_json(self.out / "report.json", report)
        return report
