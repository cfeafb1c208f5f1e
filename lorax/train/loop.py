"""The loop: batches in, steps taken, somebody told after each one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lorax.errors import LoraxError
from lorax.train.schedule import Schedule
from lorax.train.step import Batch, Metrics, State


class Row(NamedTuple):
    """What a step did, in plain numbers: a row of `metrics.jsonl`.

    Attributes:
        step: counted from 1.
        loss: mean over the completion tokens of the step, in nats.
        grad_norm: global norm before clipping.
        lr: the learning rate that was applied.
        tokens: tokens that went through the model, padding not counted.
        completion_tokens: tokens that the loss counted.
        seconds: wall time of the step.
        compiled: whether the step had to be compiled for a new shape; its time is not a speed.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    completion_tokens: int
    seconds: float
    compiled: bool


class Diverged(LoraxError):
    """The loss or its gradient is no longer a number."""


def fit(
    step: Callable[[State, PyTree, Batch], tuple[State, Metrics]],
    state: State,
    frozen: PyTree,
    batches: Iterator[Batch],
    *,
    steps: int,
    rate: Schedule,
    accumulate: int = 1,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    after: Callable[[State, Row], None] = lambda state, row: None,
) -> State:
    """Take optimizer steps until `state.step` is `steps`.

    Args:
        step: from `make_step`.
        state: where to begin; its buffers are donated.
        frozen: what does not train.
        batches: micro-batches of numpy arrays, endless.
        steps: the last step's number.
        rate: the schedule, for the row.
        accumulate: micro-batches to a step.
        place: puts the stacked micro-batches onto devices, if they are not to go to the default one.
        after: called after each step, to log, save and evaluate. What it raises ends the loop.

    Returns:
        The state after the last step.

    Raises:
        Diverged: the loss or the gradient of a step is NaN or infinite; names the step.
    """
    shapes: set[tuple[int, ...]] = set()
    for number in range(int(state.step) + 1, steps + 1):
        began = time.perf_counter()
        batch = place(stacked([next(batches) for _ in range(accumulate)]))
        shape = batch["weights"].shape
        state, metrics = step(state, frozen, batch)
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"step {number}: the loss is {loss} and the gradient norm {norm}")
        row = Row(
            step=number,
            loss=loss,
            grad_norm=norm,
            lr=float(rate(number - 1)),
            tokens=int((batch["segment_ids"] > 0).sum()),
            completion_tokens=int(metrics.tokens),
            seconds=time.perf_counter() - began,
            compiled=shape not in shapes,
        )
        shapes.add(shape)
        after(state, row)
    return state


def stacked(batches: list[Batch]) -> Batch:
    """Micro-batches on a new leading axis; shorter ones are padded with positions that do not count.

    Zero is padding in every field: token 0 in segment 0 with weight 0.
    """
    width = max(batch["weights"].shape[1] for batch in batches)

    def wide(x):
        return np.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    return jax.tree.map(lambda *xs: np.stack([wide(x) for x in xs]), *batches)
