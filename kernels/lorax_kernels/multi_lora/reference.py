"""The meaning of `multi_lora` in a few lines of plain JAX: every row meets every rank, and all but its own are masked.

Its derivatives are autodiff's. It is the oracle of the other implementations and, in float64, of itself.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sum_dtype(dtype: Any) -> Any:
    """What sums of products are made in: float32 at least."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def owned(start: Int[Array, "groups"], rank: Int[Array, "groups"], total: int) -> Bool[Array, "groups total"]:
    """Which rows of a factor belong to each group."""
    row = jnp.arange(total, dtype=start.dtype)
    return (row >= start[:, None]) & (row < (start + rank)[:, None])


def apply(
    x: Float[Array, "groups rows k"],
    a: Float[Array, "total k"],
    b: Float[Array, "total n"],
    start: Int[Array, "groups"],
    rank: Int[Array, "groups"],
    weight: Float[Array, "groups"],
) -> Float[Array, "groups rows n"]:
    """weight[g] * (x[g] @ a[segment of g]^T) @ b[segment of g]."""
    exact = jax.lax.Precision.HIGHEST
    mine = owned(start, rank, a.shape[0])
    # Rows of nobody may hold anything: they are taken out before they are multiplied with.
    used = jnp.any(mine, axis=0)[:, None]
    a, b = (jnp.where(used, f, jnp.zeros((), f.dtype)) for f in (a, b))
    h = jnp.einsum("gtk,pk->gtp", x, a, precision=exact)
    h = h * jnp.where(mine, weight[:, None], 0)[:, None, :].astype(h.dtype)
    return jnp.einsum("gtp,pn->gtn", h, b, precision=exact)
