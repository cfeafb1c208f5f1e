"""Attention over keys and values in pages: a row's own tokens, and those before them wherever their pages lie.

The pool is read and not written while the layers run; the new tokens' keys and values come out of the loop over
layers and go into their pages in one update at the end, in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lorax.models.attention import HIDDEN
from lorax.serve.geometry import Geometry


class Rows(NamedTuple):
    """What a step computes, row by row.

    ids: tokens, padded behind. start: tokens of the row that the pages have already. count: real tokens of `ids`.
    table: the pages of the row, from its first token on, long enough for the new ones.
    """

    ids: Int[Any, "rows tokens"]
    start: Int[Any, "rows"]
    count: Int[Any, "rows"]
    table: Int[Any, "rows pages"]


def positions(rows: Rows) -> Int[Array, "rows tokens"]:
    """Of each token in its sequence."""
    return rows.start[:, None] + jnp.arange(rows.ids.shape[1], dtype=jnp.int32)


def attend_pages(
    place: Geometry,
    pool: Float[Array, "pages size"],
    rows: Rows,
    layer: Int[Array, ""],
    window: Int[Array, ""] | int | None,
    q: Float[Array, "rows tokens heads d"],
    k: Float[Array, "rows tokens kv d"],
    v: Float[Array, "rows tokens kv d"],
) -> Float[Array, "rows tokens heads d"]:
    """softmax(q k^T / sqrt(d)) v over what the pages hold and over the row's own earlier tokens."""
    n, t, heads, d = q.shape
    kv = place.kv_heads
    before, own = _visible(place, rows, t, window)
    old_k, old_v = (_gather(place, pool, rows.table, layer, which).astype(q.dtype) for which in (0, 1))
    # Heads in front; the queries that share a key head are rows of one product.
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(n, t, kv, heads // kv, d)
    q = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(n, kv, -1, d)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = _masked(_batched(q, old_k, 3), before)
    # With one token a row its own key and value are a sum and a product, not a thousand small matrix products.
    one = t == 1
    mine = jnp.sum(q * k, axis=-1, keepdims=True).astype(jnp.float32) if one else _masked(_batched(q, k, 3), own)
    peak = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (scores, mine)))
    p, p_mine = jnp.exp(scores - peak), jnp.exp(mine - peak)
    total = jnp.sum(p, axis=-1, keepdims=True) + jnp.sum(p_mine, axis=-1, keepdims=True)
    out = _batched(p.astype(q.dtype), old_v, 2)
    out = out + (p_mine * v.astype(jnp.float32) if one else _batched(p_mine.astype(q.dtype), v, 2))
    out = (out / total).astype(q.dtype).reshape(n, kv, heads // kv, t, d)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(n, t, heads, d)


def _batched(x: Array, y: Array, axis: int) -> Array:
    numbers = (((3,), (axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _masked(scores: Array, see: Bool[Array, "rows tokens keys"]) -> Array:
    """Scores (rows, kv, group * tokens, keys) of what may be seen."""
    n, kv, many, keys = scores.shape
    t = see.shape[1]
    return jnp.where(see[:, None, None], scores.reshape(n, kv, many // t, t, keys), HIDDEN).reshape(scores.shape)


def _visible(place: Geometry, rows: Rows, t: int, window: Array | int | None) -> tuple[Array, Array]:
    """Which tokens in the pages, and which of the row's own, each token may see."""
    at = positions(rows)
    slot = jnp.arange(rows.table.shape[1] * place.page_tokens, dtype=jnp.int32)
    before = jnp.broadcast_to((slot < rows.start[:, None])[:, None], (*at.shape, slot.shape[0]))
    i = jnp.arange(t, dtype=jnp.int32)
    # A padded token sees itself: its sums are finite, and nobody reads them.
    own = (i[:, None] >= i[None]) & ((i[None, None] < rows.count[:, None, None]) | (i[:, None] == i[None]))
    if window is not None:
        before &= at[:, :, None] - slot < window
        own &= i[:, None] - i[None] < window
    return before, own


def _gather(place: Geometry, pool: Array, table: Array, layer: Array, which: int) -> Float[Array, "rows kv slots d"]:
    """Keys (0) or values (1) of one layer, whole runs of a page's tokens at a time."""
    g, (n, pages) = place, table.shape
    runs = pool.reshape(-1, g.layers, 2, g.kv_heads, g.page_tokens * g.head_dim)
    heads = jnp.arange(g.kv_heads, dtype=jnp.int32)[None, :, None]
    found = runs.at[table[:, None], layer, which, heads].get(mode="promise_in_bounds")
    return found.reshape(n, g.kv_heads, pages * g.page_tokens, g.head_dim)


def write_pages(
    place: Geometry,
    pool: Float[Array, "pages size"],
    rows: Rows,
    k: Float[Array, "layers rows tokens kv d"],
    v: Float[Array, "layers rows tokens kv d"],
) -> Float[Array, "pages size"]:
    """The pool with the new tokens' keys and values; what is padding goes to page 0."""
    g, at = place, positions(rows)
    real = jnp.arange(at.shape[1], dtype=jnp.int32) < rows.count[:, None]
    size = jnp.int32(g.page_tokens)
    index = jnp.minimum(at // size, rows.table.shape[1] - 1)
    page = jnp.where(real, jnp.take_along_axis(rows.table, index, axis=1), 0).reshape(-1)
    # What is hidden counts as zero times what is there: a pool that holds finite numbers alone hides nothing badly, and
    # a text that overflows spoils no other that has its pages later.
    new = jnp.nan_to_num(jnp.stack([k, v]).astype(pool.dtype))
    new = new.reshape(2, g.layers, -1, g.kv_heads, g.head_dim)
    new = jnp.transpose(new, (2, 1, 0, 3, 4))
    runs = pool.reshape(-1, g.layers, 2, g.kv_heads, g.page_tokens, g.head_dim)
    return runs.at[page, :, :, :, (at % size).reshape(-1)].set(new, mode="promise_in_bounds").reshape(pool.shape)
