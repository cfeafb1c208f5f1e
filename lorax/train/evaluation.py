"""Loss and exact match on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lorax.train.loss import features, score

Batch = dict[str, Any]


class Evaluation(NamedTuple):
    """Figures over a set of examples.

    Attributes:
        accuracy: part of the examples whose whole completion greedy decoding would reproduce, 0..1; of labels, those
            that are right; of preferences, those in which the preferred answer gained more. None for numbers.
        loss: mean over completion tokens (labels, pairs), in nats; of numbers, the mean squared error.
        items: examples seen.
        tokens: completion tokens seen.
    """

    accuracy: float | None
    loss: float
    items: int
    tokens: int


def make_scorer(model: Any) -> Callable[[PyTree, Batch], tuple[Float[Array, " rows"], ...]]:
    """A jitted `(params, batch) -> (loss sum, misses, tokens)` per row, for plain or adapted parameters.

    Greedy decoding writes exactly the completion if and only if every completion token is the argmax under
    teacher forcing, so a row without misses is an exact match and no decoding is needed.

    Args:
        model: anything with `.hidden(params, ids, positions, segment_ids)` and `.head(params, rows)`.
    """
    from lorax import lift

    def rows(params, batch):
        hidden = features(model, params, batch)
        live = (batch["weights"] > 0).astype(jnp.float32)
        scores = score(lambda x: model.head(params, x), hidden, batch["targets"], batch["weights"])
        return jnp.sum(scores.loss, axis=-1), jnp.sum(live - scores.hit, axis=-1), jnp.sum(live, axis=-1)

    return jax.jit(lift(rows))


def evaluate(
    scorer: Callable[[PyTree, Batch], tuple[Float[Array, " rows"], ...]],
    params: PyTree,
    batches: Iterable[Batch],
    *,
    tick: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Run `scorer` over batches with one example per row; rows without a completion are padding and are
    skipped.

    Args:
        scorer: from `make_scorer`.
        params: plain or adapted parameters.
        batches: dicts of numpy arrays as `lorax.data.eval_batches` gives.
        tick: called with the number of examples after each batch (progress, interruption). A scorer that knows no hits
            says NaN for the misses.
    """
    loss, exact, items, tokens, blind = 0.0, 0, 0, 0, False
    for batch in batches:
        total, misses, count = (np.asarray(x, np.float64) for x in scorer(params, batch))
        real = count > 0
        loss += float(total[real].sum())
        exact += int((misses[real] == 0).sum())
        blind |= bool(np.isnan(misses[real]).any())
        tokens += int(count.sum())
        items += int(real.sum())
        tick(int(real.sum()))
    accuracy = None if blind else exact / max(items, 1)
    return Evaluation(accuracy, loss / max(tokens, 1), items, tokens)
