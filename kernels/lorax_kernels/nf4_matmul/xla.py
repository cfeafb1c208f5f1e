"""Products with a 4-bit weight in plain JAX: the meaning of the operation, and the CPU's implementation.

    y = x W        y = x W^T        W^T = dequantise(q), held as (n, k)

The weight is dequantised in strips that stay in the processor's cache, so no array of W's size is made; the backward
pass dequantises again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax_kernels.nf4.array import QuantizedArray
from lorax_kernels.nf4.dequantize import four_bit_rows, resolve_scales
from lorax_kernels.nf4.formats import FORMATS
from lorax_kernels.nf4.layouts import canonical

# A strip of W in float32. Larger ones leave the cache, and fresh pages cost more than the product with a few rows.
STRIP_BYTES = 8 << 20

# What is done to dequantised values before they are used (casts, constants), `(values, *extras) -> values`.
Post = Callable[..., jax.Array]


def matmul(
    x: Float[Array, "*rows k"],
    q: QuantizedArray,
    transpose: bool = False,
    post: Post | None = None,
    extras: tuple[jax.Array, ...] = (),
    strips: int | None = None,
    **options: Any,
) -> Float[Array, "*rows n"]:
    """x @ W, or x @ W^T.

    Args:
        x: activations; `(*rows, n)` for the transposed product.
        q: W as (n, k), without stacked axes, whole blocks in its rows; nf4 or fp4.
        transpose: multiply with W^T, (n, k).
        post: what is done to the dequantised values, which come in `q.dtype`; elementwise.
        extras: arrays that `post` takes.
        strips: how many strips W is cut into; by default as many as keep one in the cache, and one where the process
            has several devices, whose compiler then splits the product along its axes.
        options: `precision` and `preferred_element_type` of `jax.lax.dot_general`.
    """
    q = canonical(q)
    n, k = q.slice_shape
    count = strips_of(n, k) if strips is None else strips
    codebook = FORMATS[q.format].codebook
    assert codebook is not None, q.format
    axis = 0 if transpose else 1

    def strip(x: jax.Array, codes: jax.Array, scales: jax.Array, *extras: jax.Array) -> jax.Array:
        weight = four_bit_rows(codes, scales, codebook, q.block_size, q.dtype)
        weight = weight if post is None else post(weight, *extras)
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (axis,)), ((), ())), **options)

    def product(x: jax.Array, q: QuantizedArray, *extras: jax.Array) -> jax.Array:
        scales = resolve_scales(q)
        if count == 1:
            return strip(x, q.codes, scales, *extras)
        codes, scales = (a.reshape(count, n // count, -1) for a in (q.codes, scales))
        # Each strip is made again in the backward pass; the outer checkpoint keeps the scales from being kept as well.
        one = jax.checkpoint(strip, prevent_cse=False)
        if transpose:
            rows = jnp.moveaxis(x.reshape(*x.shape[:-1], count, n // count), -2, 0)
            first = one(rows[0], codes[0], scales[0], *extras)
            body: Any = lambda y, part: (y + one(*part, *extras), None)  # noqa: E731
            return jax.lax.scan(body, first, (rows[1:], codes[1:], scales[1:]))[0]
        parts = jax.lax.map(lambda part: one(x, *part, *extras), (codes, scales))
        return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], n)

    return jax.checkpoint(product)(x, q, *extras)


def strips_of(n: int, k: int) -> int:
    """The least divisor of n that makes strips of at most STRIP_BYTES; 1 if none is near."""
    if jax.device_count() > 1:
        return 1
    least = max(1, math.ceil(n * k * 4 / STRIP_BYTES))
    return next((count for count in range(least, min(n, 4 * least) + 1) if n % count == 0), 1)
