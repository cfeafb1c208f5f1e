"""A bank's product on a mesh: the rows that an example's adapter owns are fetched to where the example is.

    A_g = A[start_g : start_g + max_rank]      (groups, max_rank, k), zeros beyond the adapter's rank
    y_g + weight_g (x_g A_g^T) B_g             one batched product for each factor

The loop that serves one device reads the bank where it lies; a compiler that splits it over devices would gather the
whole bank for that. Plain operations, it splits well: each device picks the rows out of its part of the bank, whichever
axis is split, and what crosses the wire is examples x max_rank x (k + n) numbers, whatever the number of adapters. The
gradient goes the same way back. The price is arithmetic for max_rank where an adapter's rank is smaller.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lorax_kernels.multi_lora.reference import sum_dtype
from lorax_kernels.placement import Placement


def product(
    place: Placement,
    bound: int,
    precision: Any,
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    start: jax.Array,
    rank: jax.Array,
    weight: jax.Array,
    names: tuple[str | None, str | None],
) -> jax.Array:
    """y + weight (x A^T) B for each group.

    x: (groups, rows, k); y: (groups, rows, n); a: (total, k), b: (total, n), those of one layer; start, rank, weight:
    (groups,); names: the mesh axes of k and n.
    """
    wide = sum_dtype(x.dtype)
    mine, theirs = (
        _rows(place, f, start, rank, bound, name).astype(x.dtype) for f, name in zip((a, b), names, strict=True)
    )
    h = jnp.einsum("gtk,grk->gtr", x, mine, precision=precision, preferred_element_type=wide)
    h = (h * weight.astype(wide)[:, None, None]).astype(x.dtype)
    return y + jnp.einsum("gtr,grn->gtn", h, theirs, precision=precision, preferred_element_type=y.dtype)


def _rows(place: Placement, f: jax.Array, start: Any, rank: Any, bound: int, name: str | None) -> jax.Array:
    """Each group's rows of a factor, zeros in the place of others'; whole along an axis that splits the batch too."""
    position = jnp.arange(min(bound, f.shape[0]), dtype=start.dtype)
    found = jnp.take(f, start[:, None] + position, axis=0, mode="clip")
    found = jnp.where((position < rank[:, None])[..., None], found, jnp.zeros((), f.dtype))
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None, None if name in place.rows else name)
    return jax.lax.with_sharding_constraint(found, NamedSharding(place.mesh, spec))
