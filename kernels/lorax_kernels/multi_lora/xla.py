"""`multi_lora` in plain JAX: a loop over what there is to do, as long as the sum of the ranks that are asked for.

An item of work is a block of rows of one adapter times a block of its rank:

    h = x[rows] @ a[ranks]^T          y[rows] += (w h) @ b[ranks]          out[ranks] += (w (dy @ b^T))^T @ x

so storage is read where it lies, in slices, and nothing is padded to the largest rank or copied per example. Where
every adapter has many rows, rows come as they are; where a group is a row or a few (`sorted`), they are put in order of
their adapter first and taken in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_kernels.multi_lora.reference import sum_dtype

# Rows of rank in one item. 16 to 48 are alike on a CPU; 8 calls too often, 64 computes more than small ranks need.
RANKS = 32
# Rows of x in one item, where they are sorted.
TILE = 32


@dataclass(frozen=True)
class Items:
    """Blocks of rows, each of one adapter: all arrays have one entry for each block.

    first: where the window of `size` rows begins; low, high: the rows in it that count.
    count: how many entries are in use.
    """

    first: jax.Array
    low: jax.Array
    high: jax.Array
    starts: tuple[jax.Array, jax.Array]
    rank: jax.Array
    size: int
    count: Any


def apply(
    y: Any, x: Any, a: Any, b: Any, a_start: Any, b_start: Any, rank: Any, weight: Any, options: Any, in_order: bool
) -> jax.Array:
    """Every item's product, added in place."""
    groups, rows, _ = x.shape
    out = jnp.zeros((groups, rows, b.shape[1]), options.dtype) if y is None else y
    flat, order, items, w = _arrange(x, a_start, b_start, rank, weight, in_order)
    dot = _dot(options)

    def step(out: jax.Array, at: _At) -> jax.Array:
        rows_of = lambda z: lax.dynamic_slice_in_dim(z, at.row, items.size)  # noqa: E731
        ranks, shift_a = _window(a, at.first_a, at.size)
        h = dot(rows_of(flat), ranks.astype(x.dtype), 1, 1, jnp.float32) * rows_of(w)[:, None]
        other, shift_b = _window(b, at.first_b, at.size)
        mine = at.ranks(shift_b)
        # Rows of other adapters are taken out of both operands: zero times their NaN would be NaN.
        h = jnp.where(at.rows[:, None] & mine, _rolled(h, shift_b - shift_a), 0)
        other = jnp.where(mine[:, None], other, jnp.zeros((), b.dtype)).astype(x.dtype)
        old = rows_of(out)
        new = old + dot(h.astype(x.dtype), other, 1, 0, out.dtype).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, new, at.row, 0)

    flat_out = _loop(items, min(options.max_rank, a.shape[0], b.shape[0]), step, _take(out, order))
    return _put(flat_out, order).reshape(out.shape)


def grad(
    x: Any, dy: Any, b: Any, b_start: Any, out_start: Any, rank: Any, weight: Any, options: Any, in_order: bool
) -> jax.Array:
    """Every item's outer product, added to the rows of its ranks."""
    flat, order, items, w = _arrange(x, b_start, out_start, rank, weight, in_order)
    flat_dy = _take(dy, order)
    dot = _dot(options)
    # Sums over many items in 16 bits would lose them.
    wide = sum_dtype(options.dtype)
    out = jnp.zeros((options.total, x.shape[2]), wide)

    def step(out: jax.Array, at: _At) -> jax.Array:
        rows_of = lambda z: lax.dynamic_slice_in_dim(z, at.row, items.size)  # noqa: E731
        ranks, shift_b = _window(b, at.first_a, at.size)
        u = dot(rows_of(flat_dy), ranks.astype(dy.dtype), 1, 1, jnp.float32) * rows_of(w)[:, None]
        old, shift = _window(out, at.first_b, at.size)
        mine = at.ranks(shift)
        u = jnp.where(at.rows[:, None] & mine, _rolled(u, shift - shift_b), 0)
        kept = jnp.where(at.rows[:, None], rows_of(flat), jnp.zeros((), x.dtype))
        new = jnp.where(mine[:, None], dot(u.astype(x.dtype), kept, 0, 0, wide).astype(wide), 0)
        return lax.dynamic_update_slice_in_dim(out, old + new, at.first_b - shift, 0)

    return _loop(items, min(options.max_rank, b.shape[0], options.total), step, out).astype(options.dtype)


@dataclass(frozen=True)
class _At:
    """One item: its window of rows, which of them count, where its ranks begin in both factors, how many are left."""

    row: jax.Array
    rows: jax.Array
    first_a: jax.Array
    first_b: jax.Array
    left: jax.Array
    size: int

    def ranks(self, shift: jax.Array) -> jax.Array:
        """Which rows of a window count, the window having been moved back by `shift`."""
        position = jnp.arange(self.size, dtype=jnp.int32) - shift
        return (position >= 0) & (position < self.left)


def _loop(items: Items, bound: int, step: Any, carry: jax.Array) -> jax.Array:
    """`step` for every block of rows and every block of its ranks."""
    size = min(RANKS, bound)
    blocks = lax.div(items.rank + jnp.int32(size - 1), jnp.int32(size))
    ends = jnp.cumsum(blocks, dtype=jnp.int32)

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        item = jnp.searchsorted(ends, i, side="right").astype(jnp.int32) if bound > size else i
        done = (i - (ends[item] - blocks[item])) * size if bound > size else jnp.int32(0)
        row = items.first[item]
        within = row + jnp.arange(items.size, dtype=jnp.int32)
        counts = (within >= items.low[item]) & (within < items.high[item])
        first_a, first_b = (start[item] + done for start in items.starts)
        return step(carry, _At(row, counts, first_a, first_b, items.rank[item] - done, size))

    total = ends[-1] if bound > size else items.count
    return lax.fori_loop(jnp.int32(0), jnp.asarray(total, jnp.int32), body, carry)


def _window(x: jax.Array, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` rows from `start` on, moved back where they would end outside, and how far."""
    first = jnp.minimum(start, x.shape[0] - size)
    return lax.dynamic_slice_in_dim(x, first, size), start - first


def _rolled(h: jax.Array, by: jax.Array) -> jax.Array:
    """Columns moved to the right by `by`, around the end."""
    size = h.shape[1]
    return lax.dynamic_slice_in_dim(jnp.concatenate([h, h], axis=1), lax.rem(size - by, jnp.int32(size)), size, 1)


def _dot(options: Any) -> Any:
    def dot(one: jax.Array, other: jax.Array, i: int, j: int, dtype: Any) -> jax.Array:
        dtype = sum_dtype(one.dtype) if dtype == jnp.float32 else dtype
        numbers = (((i,), (j,)), ((), ()))
        return lax.dot_general(one, other, numbers, precision=options.precision, preferred_element_type=dtype)

    return dot


def _arrange(
    x: jax.Array, a_start: Any, b_start: Any, rank: Any, weight: Any, in_order: bool
) -> tuple[jax.Array, Any, Items, jax.Array]:
    """Rows as the loop takes them, how they were ordered (None: as they came), the items, the factor of each row."""
    groups, rows, k = x.shape
    a_start, b_start, rank = (z.astype(jnp.int32) for z in (a_start, b_start, rank))
    wide = sum_dtype(x.dtype)
    w = jnp.repeat(weight.astype(wide), rows, total_repeat_length=groups * rows)
    if in_order:
        first = jnp.arange(groups, dtype=jnp.int32) * rows
        items = Items(first, first, first + rows, (a_start, b_start), rank, rows, groups)
        return x.reshape(-1, k), None, items, w
    each = lambda z: jnp.repeat(z, rows, total_repeat_length=groups * rows)  # noqa: E731
    a_start, b_start, rank = map(each, (a_start, b_start, rank))
    order = jnp.lexsort((b_start, a_start, rank == 0))
    a_start, b_start, rank, w = (z[order] for z in (a_start, b_start, rank, w))
    return x.reshape(-1, k)[order], order, _tiles(a_start, b_start, rank), w


def _tiles(a_start: jax.Array, b_start: jax.Array, rank: jax.Array) -> Items:
    """Sorted rows in tiles of one adapter each; rows without an adapter come last and are in none."""
    n = rank.shape[0]
    size = min(TILE, n)
    at = jnp.arange(n, dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones(1, bool), (a_start[1:] != a_start[:-1]) | (b_start[1:] != b_start[:-1])])
    new |= jnp.concatenate([jnp.zeros(1, bool), (rank[1:] == 0) != (rank[:-1] == 0)])
    run = lax.cummax(jnp.where(new, at, 0))
    # The end of each run: the next beginning, found from the right.
    ends = lax.cummin(jnp.where(new, at, n)[::-1])[::-1]
    ends = jnp.concatenate([ends[1:], jnp.full(1, n, jnp.int32)])
    begins = (lax.rem(at - run, jnp.int32(size)) == 0) & (rank > 0)
    (low,) = jnp.nonzero(begins, size=n, fill_value=n - 1)
    low = low.astype(jnp.int32)
    count = jnp.sum(begins, dtype=jnp.int32)
    used = at < count
    high = jnp.where(used, jnp.minimum(low + size, ends[low]), low)
    first = jnp.minimum(low, n - size)
    return Items(first, low, high, (a_start[low], b_start[low]), jnp.where(used, rank[low], 0), size, count)


def _take(x: jax.Array, order: Any) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    return flat if order is None else flat[order]


def _put(x: jax.Array, order: Any) -> jax.Array:
    """Rows back where they came from."""
    return x if order is None else x[jnp.argsort(order)]
