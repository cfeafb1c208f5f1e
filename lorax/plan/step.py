"""The step of a job as a program, lowered for its mesh: what `lorax train` runs, or a mixed step over a bank."""

from __future__ import annotations

from typing import Any

import jax

from lorax import bank_step, join, lift
from lorax.plan.job import Job, Trees
from lorax.sharding import batch_axes
from lorax.train.loss import cross_entropy
from lorax.train.methods import head_trains
from lorax.train.objective import language_model_loss
from lorax.train.step import make_step


def lowered_step(job: Job, given: Trees) -> Any:
    """The step, lowered; `compile` is left to the caller.

    Args:
        job: the step.
        given: its trees, on a mesh with devices (of a machine that need not be here).
    """
    if job.mixed:
        return _mixed(job, given)
    trains = head_trains(given.trainable, job.config)
    loss = language_model_loss(given.model, head_trains=trains, chunk=job.chunk, groups=job.data_parts)
    return make_step(loss, given.tx).lower(given.state, given.frozen, given.batch)


def _mixed(job: Job, given: Trees) -> Any:
    model = given.model

    def forward(params: Any, row: dict[str, Any]) -> Any:
        hidden = model.hidden(params, row["ids"], row["positions"], row["segment_ids"])
        params = model.head_at_hand(params)
        head = lambda rows: model.head(params, rows)  # noqa: E731
        return cross_entropy(head, hidden, row["targets"], row["weights"], head_trains=False, chunk=job.chunk)

    def loss(params: Any, row: dict[str, Any]) -> Any:
        return lift(forward)(params, {name: x[None] for name, x in row.items()})

    rows = batch_axes(tuple(job.mesh))
    step = jax.jit(bank_step(loss, given.tx, over=rows or None), donate_argnums=(0, 1))
    batch = dict(given.batch)
    ids = batch.pop("adapter")
    return step.lower(join(given.trainable, given.frozen), given.state.opt_state, ids, batch)
