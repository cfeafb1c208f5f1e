"""The keys and values of tokens already read, at a fixed size, so that generation compiles once.

All rows of a batch append to the same slots. What tells the rows apart is `positions`: a padding token takes
a slot and is marked -1 there, so prompts of different lengths may be padded on either side, or in the middle.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from lorax.errors import LoraxError
from lorax.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys, values and where they are.

    positions: of the token in each slot, within its row; -1 where the slot is empty or holds padding.
    next: the position of each row's next token, which is the number of tokens it has.
    used: slots filled so far, the same for all rows.
    """

    k: Float[Array, "layers b s kv d"]
    v: Float[Array, "layers b s kv d"]
    positions: Int[Array, "b s"]
    next: Int[Array, b]
    used: Int[Array, ""]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens, padding included."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, length), -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.int32(0),
    )


def reserve(cache: Cache, real: Bool[Array, "b t"]) -> tuple[Cache, Int[Array, "b t"]]:
    """Give the next slots to a chunk of tokens, padding marked by False.

    Returns:
        The cache with the chunk's positions entered (its keys and values come layer by layer), and those
        positions; a padding token gets the position that the next token will have.

    Raises:
        LoraxError: the chunk is longer than what is left. Inside `jit` what is left is not known: the caller
            must make the cache long enough there.
    """
    t, size = real.shape[1], cache.positions.shape[1]
    used = cache.used
    if t > size or (not isinstance(used, Tracer) and int(used) + t > size):
        raise LoraxError(f"cache: {t} more tokens do not fit in {size} slots; make it longer with init_cache")
    count = jnp.cumsum(real.astype(jnp.int32), axis=1)
    positions = cache.next[:, None] + count - real.astype(jnp.int32)
    entered = jnp.where(real, positions, -1)
    slots = jax.lax.dynamic_update_slice(cache.positions, entered, (jnp.zeros_like(used), used))
    return cache._replace(positions=slots, next=cache.next + count[:, -1], used=used + t), positions


def visible_slots(cache: Cache, positions: Int[Array, "b t"], window: int | None) -> Bool[Array, "b t s"]:
    """Which slots a chunk with these positions may see: filled ones, not later, within the window."""
    distance = positions[:, :, None] - cache.positions[:, None, :]
    see = (cache.positions[:, None, :] >= 0) & (distance >= 0)
    return see if window is None else see & (distance < window)
