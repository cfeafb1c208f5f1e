"""`multi_lora`: y += scale[id] * (x @ A[id]) @ B[id], each block of rows with its own adapter.

Contract, the same for every backend.

Storage is unpadded. All adapters lie one after the other along one axis, the total rank, rank first in both factors:

    a (total, k)   rows start[i] .. start[i] + rank[i] are A_i^T, the factor that meets x
    b (total, n)   the same rows are B_i

Rows of x come in groups of equally many rows, and a group has one adapter:

    y[g] += weight[g] * (x[g] @ a[rows of g]^T) @ b[rows of g]        x (groups, rows, k), y (groups, rows, n)

One row a group is the decode shape (a token a request) and also what per-token routing gives; many rows a group is
training and prefill. Groups come in any order, two may have the same adapter, some adapters may have none. Rank 0 is
the base alone: nothing is read and nothing added. `start`, `rank` and `weight` are arrays, so that adding an adapter
to a bank compiles nothing; what is static is `max_rank`, a bound on every rank. Rows of a and b that belong to no
adapter of the batch may hold anything, NaN too, and do not reach y.

x and y may be 16 bit while a and b are float32: a factor's rows are cast to x's dtype when they are used, `x @ A` is
summed in float32, and y is added to in its own dtype.

Derivatives of any order, in y, x, a, b and weight; reverse mode is closed under two operations, which is all that a
backend has to give (`primitive.py` has the algebra):

    apply   y + w (x a^T) b            dx = apply(dy, b, a)
    grad    da[p] = sum over rows of p's groups of w (dy . b[p]) x      db = grad with x and dy, a and b swapped

Rows of `grad` that no group owns are exactly zero. `vmap` makes groups of what it maps, so that a function for one
example with one adapter becomes one call for the whole batch, and `vmap` of `grad` gives each example's own gradient.

Notes for backends. The start of `a` and of `b` may differ (`Segments`): inside a scan over layers the operand is the
whole stack, (layers * total, k), with the layer in the start, so that no layer of a large bank is copied out. The TPU's
kernel takes any start and reads whole tiles of memory; adapters that begin with one (`lorax.stack(..., align=8)`) move
the fewest bytes and are not shifted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorax_kernels.multi_lora import primitive


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """Where each adapter of a bank lies: `start` and `rank` along the total rank, and its scale."""

    start: Int[Array, "slots"]
    rank: Int[Array, "slots"]
    scale: Float[Array, "slots"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The part of `a` and of `b` that each group takes, and its factor. Rank 0 takes none."""

    a_start: Int[Array, "groups"]
    b_start: Int[Array, "groups"]
    rank: Int[Array, "groups"]
    weight: Float[Array, "groups"]


def segments(table: Table, ids: Int[Array, "groups"]) -> Segments:
    """The segments of adapters by id. An id outside the table, -1 among them, is the base alone."""
    slots = table.rank.shape[0]
    inside = (ids >= 0) & (ids < slots)
    safe = jnp.where(inside, ids, 0)
    rank = jnp.where(inside, table.rank[safe], 0)
    start = jnp.where(inside, table.start[safe], 0)
    weight = jnp.where(inside, table.scale[safe], jnp.zeros((), table.scale.dtype))
    return Segments(start, start, rank, weight)


def multi_lora(
    x: Float[Array, "rows k"],
    a: Float[Array, "total k"],
    b: Float[Array, "total n"],
    table: Table,
    ids: Int[Array, "groups"],
    max_rank: int,
    y: Float[Array, "rows n"] | None = None,
) -> Float[Array, "rows n"]:
    """y + scale[id] * (x @ A[id]) @ B[id] over flat rows.

    Args:
        x: rows of activations.
        a, b: the factors of all adapters, concatenated along the total rank.
        table: where each adapter lies.
        ids: the adapter of each row, or of each of equally long blocks of rows; -1 for the base alone.
        max_rank: a bound on the ranks in the table. A longer adapter would be cut off without a word.
        y: what is added to; zeros if absent.

    Returns:
        y with the changes, in y's dtype (x's without y).

    Raises:
        ValueError: rows that are no multiple of the ids, or shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> table = Table(start=jnp.array([0, 1]), rank=jnp.array([1, 2]), scale=jnp.array([1.0, 0.5]))
        >>> x, a, b = jnp.ones((3, 4)), jnp.ones((3, 4)), jnp.ones((3, 2))
        >>> multi_lora(x, a, b, table, jnp.array([1, -1, 0]), max_rank=2)[:, 0].tolist()
        [4.0, 0.0, 4.0]
    """
    groups = math.prod(ids.shape)
    if ids.ndim != 1 or groups == 0 or x.shape[0] % groups:
        raise ValueError(f"multi_lora: {x.shape[0]} rows cannot be shared out among ids of shape {ids.shape}")
    shape = (groups, x.shape[0] // groups)
    blocks = None if y is None else y.reshape(*shape, -1)
    out = grouped(x.reshape(*shape, -1), a, b, segments(table, ids), max_rank, blocks)
    return out.reshape(x.shape[0], -1)


def grouped(
    x: Float[Array, "groups rows k"],
    a: Float[Array, "total_a k"],
    b: Float[Array, "total_b n"],
    segments: Segments,
    max_rank: int,
    y: Float[Array, "groups rows n"] | None = None,
    precision: Any = None,
) -> Float[Array, "groups rows n"]:
    """The operation itself: y[g] + weight[g] * (x[g] @ a[segment of g]^T) @ b[segment of g].

    Differentiable in y, x, a, b and `segments.weight`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or a.shape[1:] != x.shape[2:] or b.ndim != 2 or segments.rank.shape != x.shape[:1]:
        raise ValueError(f"multi_lora: x {x.shape}, a {a.shape}, b {b.shape}, groups {segments.rank.shape} do not fit")
    if y is not None and y.shape != (*x.shape[:2], b.shape[1]):
        raise ValueError(f"multi_lora: y is {y.shape}, and the result has shape {(*x.shape[:2], b.shape[1])}")
    return primitive.apply(
        y,
        x,
        a,
        b,
        segments.a_start,
        segments.b_start,
        segments.rank,
        segments.weight,
        primitive.Options(max_rank, jnp.dtype(x.dtype if y is None else y.dtype), precision),
    )
