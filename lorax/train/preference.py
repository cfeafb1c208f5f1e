"""DPO: learn from pairs of answers, one preferred, without a reward model.

    d_i  = log pi(y_i | x) - log pi_ref(y_i | x)            of the preferred answer (w) and the other one (l)
    loss = -log sigmoid(beta (d_w - d_l))

The reference pi_ref is the same tree with the adapters off: their base, which is there anyway. It is not differentiated
and sees no dropout. At the start d = 0, so the loss is log 2. Source: Rafailov et al. 2023, "Direct Preference
Optimization: Your Language Model is Secretly a Reward Model".
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax import LoraxError, dropout, join, lift
from lorax.train.loss import CHUNK, log_probs
from lorax.train.step import LossFn
from lorax.tree import map_named
from lorax.weights import Change, Concat, Full


def reference(params: Any) -> Any:
    """The tree with its adapters off: every change's base, shared and not copied.

    Raises:
        LoraxError: a weight that trains whole, of which the first value is gone.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((3, 5))}
        >>> reference(lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=1)))["w"] is base["w"]
        True
    """

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, (Full, Concat)):
            raise LoraxError(f"{path}: trains as a whole, so there is no reference to compare with; give it factors")
        return leaf.base if isinstance(leaf, Change) else leaf

    return map_named(one, params)


def preference_loss(model: Any, beta: float = 0.1, *, chunk: int = CHUNK) -> LossFn:
    """`(trainable, frozen, batch, key) -> (sum of the pairs' losses, their number)`.

    Args:
        model: anything with `.hidden(params, ids, positions, segment_ids)` and `.head(params, rows)`.
        beta: how much a change against the reference counts.
        chunk: rows of logits alive at once.

    Returns:
        A loss for `make_step`. Rows 2 i and 2 i + 1 of a batch are the preferred and the other answer of pair i; pairs
        without tokens do not count.
    """
    margins = _margins(model, beta, chunk)

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        params = join(trainable, frozen)
        margin, live = margins(dropout(params, key), reference(params), batch)
        return jnp.sum(jax.nn.softplus(-margin) * live), jnp.sum(live)

    return loss


def make_pair_scorer(model: Any, beta: float = 0.1) -> Any:
    """A scorer for `evaluate`: each pair's loss; a pair is a hit if the preferred answer gained more than the other."""
    margins = _margins(model, beta, CHUNK)

    def pairs(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        margin, live = margins(params, reference(params), batch)
        return jax.nn.softplus(-margin) * live, jnp.where(margin > 0, 0.0, live), live

    return jax.jit(pairs)


def _margins(model: Any, beta: float, chunk: int) -> Any:
    """`(params, reference, batch) -> (beta (d_w - d_l), 1 where there is a pair)`, for each pair."""

    def answers(params: Any, batch: Any) -> Float[Array, " rows"]:
        hidden = model.hidden(params, batch["ids"], batch["positions"], batch["segment_ids"])
        found = log_probs(lambda x: model.head(params, x), hidden, batch["targets"], batch["weights"], chunk=chunk)
        return jnp.sum(found, axis=-1)

    lifted = lift(answers)

    def margins(params: Any, before: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        gained = lifted(params, batch) - jax.lax.stop_gradient(lifted(before, batch))
        gained = gained.reshape(-1, 2)
        tokens = jnp.sum(batch["weights"] > 0, axis=-1).reshape(-1, 2)
        live = jnp.all(tokens > 0, axis=-1).astype(jnp.float32)
        return beta * (gained[:, 0] - gained[:, 1]), live

    return margins
