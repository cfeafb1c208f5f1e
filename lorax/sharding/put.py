"""Arrays onto a mesh, of which this process may have a part of the devices only."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def put(x: Any, place: Sharding) -> jax.Array:
    """An array where `place` says.

    On devices of several processes every process passes the same value, and copies out of it what its own devices
    hold; nothing is sent. (`jax.device_put` would send the whole array round, to compare.)

    Args:
        x: an array of this process (NumPy or JAX), or one that lies on a mesh already.
        place: where it should lie.

    Example:
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> place = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data"))
        >>> put(np.arange(4), place).sharding.spec
        PartitionSpec('data',)
    """
    if place.is_fully_addressable:
        return jax.device_put(x, place)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=place)(x)
    here = np.asarray(x)
    return jax.make_array_from_callback(here.shape, place, lambda index: here[index])
