"""Grouped-query attention over plain arrays: who may see whom, and the weighted sum.

Each of KV key heads serves a group of G = heads / KV query heads. Keys and values are never repeated: the
group is an axis of the query.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# Large and finite: a row that may see nothing (padding) gets a uniform softmax instead of 0/0.
HIDDEN = -1e30

# The name of what a layer keeps for its backward pass. The rest (norms, softmax, silu, their products) is cheaper to
# compute again than to write and read: 24 MB a layer instead of 66 for SmolLM2 on 1,024 tokens, and faster.
KEPT = "kept"

# Rows longer than this are attended to in blocks: at 4,096 tokens one sequence's scores are 67 MB a head.
LONG = 1024
QUERY_BLOCK = 512


def kept(x: Array) -> Array:
    """Mark an activation that the backward pass keeps."""
    return checkpoint_name(x, KEPT)


def visible(length: int, segment_ids: Int[Array, "b t"] | None, window: int | None) -> Bool[Array, "b t t"]:
    """Which keys (last axis) each query may see: earlier ones of its own segment, within the window.

    Args:
        length: tokens in a row.
        segment_ids: the document of each token, 0 for padding; None for one document a row.
        window: how many tokens back, itself included; None for all.

    Returns:
        True where query i may see key j; the batch axis has size 1 without segments.
    """
    i = jnp.arange(length)
    distance = i[:, None] - i[None, :]
    see = distance >= 0
    if window is not None:
        see &= distance < window
    if segment_ids is None:
        return see[None]
    return see[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s kv d"],
    v: Float[Array, "b s kv d"],
    see: Bool[Array, "b t s"],
    keep: Callable[[Array], Array] = kept,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(d)) v per head, over the visible keys; scores and softmax in float32.

    Args:
        q, k, v: queries, keys and values; each key head serves h / kv query heads in a row.
        see: which keys each query may see.
        keep: marks what a checkpoint around the call may keep for the backward pass.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jnp.arange(2.0).reshape(1, 2, 1, 1)
        >>> q = k = jnp.zeros((1, 2, 1, 1))
        >>> attend(q, k, v, visible(2, None, None)).ravel().tolist()
        [0.0, 0.5]
    """
    b, t, h, d = q.shape
    groups = k.shape[2]
    # Heads before tokens: both products and all but two of their gradients then read their operands as they lie. What
    # the backward pass keeps is kept in this order, so that it moves nothing either.
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(b, t, groups, h // groups, d)
    q, k, v = keep(jnp.moveaxis(q, 1, 3)), keep(jnp.swapaxes(k, 1, 2)), keep(jnp.swapaxes(v, 1, 2))
    heads = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(q, k, (((4,), (3,)), heads), preferred_element_type=jnp.float32)
    scores = jnp.where(see[:, None, None], scores, HIDDEN)
    # The softmax is divided by its sum after the product with v, where there are fewer numbers. With its peak and its
    # sum kept, the backward pass goes over the scores twice: to make p again, and for their gradient.
    peak = keep(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    p = jnp.exp(scores - peak)
    inverse = keep(1.0 / jnp.sum(p, axis=-1, keepdims=True))
    out = jax.lax.dot_general(p.astype(v.dtype), v, (((4,), (2,)), heads), preferred_element_type=jnp.float32)
    out = (keep(out) * inverse).astype(v.dtype)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, h, d)


def attend_in_blocks(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t kv d"],
    v: Float[Array, "b t kv d"],
    segment_ids: Int[Array, "b t"] | None = None,
    window: int | Int[Array, ""] | None = None,
    block: int = QUERY_BLOCK,
) -> Float[Array, "b t h d"]:
    """`attend` over the tokens that `visible` names, a block of queries at a time.

    The scores of a block, (b, h, block, t), are made, used and forgotten, and made again in the backward pass; neither
    all scores nor the whole mask ever exist. Each row's softmax is still taken over all its keys at once, so the result
    is that of `attend`, not an approximation. Gradients of keys and values are summed over the blocks in float32.

    Args:
        q, k, v: as for `attend`, over the same tokens.
        segment_ids, window: as for `visible`; the window may be a traced number.
        block: queries at a time; the last block is filled up with queries whose results are dropped.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jnp.arange(3.0).reshape(1, 3, 1, 1)
        >>> q = k = jnp.zeros((1, 3, 1, 1))
        >>> attend_in_blocks(q, k, v, block=2).ravel().tolist()
        [0.0, 0.5, 1.0]
    """
    b, t, h, d = q.shape
    count = -(-t // block)
    fill = ((0, 0), (0, count * block - t))
    own = jnp.zeros((1, t), jnp.int32) if segment_ids is None else segment_ids

    def in_blocks(x: Array) -> Array:
        full = jnp.pad(x, (*fill, *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(full.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    # Kept as they come: inside, each block would keep keys and values of its own.
    q, k, v = kept(q), kept(k), kept(v)
    wide = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def one(part: tuple[Array, Array, Array]) -> Array:
        queries, ids, start = part
        distance = start + jnp.arange(block)[:, None] - jnp.arange(t)[None, :]
        near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        see = near[None] & (ids[:, :, None] == own[:, None, :])
        return attend(queries, wide[0].astype(k.dtype), wide[1].astype(v.dtype), see, keep=lambda x: x)

    out = jax.lax.map(one, (in_blocks(q), in_blocks(own), block * jnp.arange(count)))
    return kept(jnp.moveaxis(out, 0, 1).reshape(b, count * block, h, d)[:, :t])
