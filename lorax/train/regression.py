"""Numbers from pooled features: the mean squared error, and its evaluation.

loss = sum_i (score(features_i) - y_i)^2            y_i a float32 whose bits lie where a token's number would
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax import dropout, join, lift
from lorax.train.loss import features
from lorax.train.step import LossFn


def squared_errors(model: Any, params: Any, batch: Any) -> Float[Array, "rows positions"]:
    """weight * (prediction - number)^2 of every position; zero where nothing is to be predicted."""
    found = model.head(params, features(model, params, batch))[..., 0].astype(jnp.float32)
    numbers = jax.lax.bitcast_convert_type(batch["targets"], jnp.float32)
    weights = batch["weights"].astype(jnp.float32)
    return jnp.where(weights > 0, weights * (found - numbers) ** 2, 0.0)


def squared_error(model: Any) -> LossFn:
    """`(trainable, frozen, batch, key) -> (sum of squared errors, how many)` of a model with one output.

    Args:
        model: anything with `.hidden` and `.head`, which gives (rows, 1).
    """
    lifted = lift(lambda params, batch: squared_errors(model, params, batch))

    def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        found = lifted(dropout(join(trainable, frozen), key), batch)
        return jnp.sum(found), jnp.sum(batch["weights"].astype(jnp.float32))

    return loss


def make_number_scorer(model: Any) -> Any:
    """A scorer for `evaluate`: squared errors; a number is no hit and no miss."""

    def rows(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = jnp.sum(squared_errors(model, params, batch), axis=-1)
        return found, jnp.full_like(found, jnp.nan), jnp.sum((batch["weights"] > 0).astype(jnp.float32), axis=-1)

    return jax.jit(lift(rows))
