"""Grouped-query attention over plain arrays: who may see whom, and the weighted sum.

Each of KV key heads serves a group of G = heads / KV query heads. Keys and values are never repeated: the
group is an axis of the query.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Large and finite: a row that may see nothing (padding) gets a uniform softmax instead of 0/0.
HIDDEN = -1e30


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
) -> Float[Array, "b t h d"]:
    """softmax(q k^T / sqrt(d)) v per head, over the visible keys; scores and softmax in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> v = jnp.arange(2.0).reshape(1, 2, 1, 1)
        >>> q = k = jnp.zeros((1, 2, 1, 1))
        >>> attend(q, k, v, visible(2, None, None)).ravel().tolist()
        [0.0, 0.5]
    """
    b, t, h, d = q.shape
    groups = k.shape[2]
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(b, t, groups, h // groups, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(see[:, None, None], scores, HIDDEN)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", p, v)
    return out.reshape(b, t, h, d)
