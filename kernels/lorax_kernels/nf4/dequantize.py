"""Blocks to arrays, in plain JAX: the reference that every kernel is tested against, and the CPU's implementation."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from lorax_kernels.nf4.array import GROUP, QuantizedArray
from lorax_kernels.nf4.dynamic8 import lookup8
from lorax_kernels.nf4.formats import FORMATS
from lorax_kernels.nf4.layouts import canonical
from lorax_kernels.nf4.rounding import rounded


def dequantize(q: QuantizedArray, dtype: Any = None) -> Float[Array, "*shape"]:
    """The array that a `QuantizedArray` stands for.

    Args:
        q: what `quantize` returned.
        dtype: of the result; by default that of the array that was quantised. Values are computed in float32 and
            rounded once.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_kernels import nf4
        >>> nf4.dequantize(nf4.quantize(jnp.full((3, 5), 2.0)))[0, 0]
        Array(2., dtype=float32)
    """
    dtype = q.dtype if dtype is None else jnp.dtype(dtype)
    q = canonical(q)
    if q.format == "bf16":
        return q.codes.astype(dtype)
    scales = resolve_scales(q)
    if q.format == "int8":
        return (q.codes.astype(jnp.float32) * (scales * jnp.float32(1 / 127))[..., None]).astype(dtype)
    codebook = FORMATS[q.format].codebook
    assert codebook is not None, f"{q.format} has no codebook"
    if q.is_regular:
        values = four_bit_rows(q.codes, scales, codebook, q.block_size, dtype)
        return values.reshape(q.shape)
    n = math.prod(q.slice_shape)
    codes = q.codes.reshape(-1, q.codes.shape[-1])
    pad = scales.shape[-1] * q.block_size // 2 - codes.shape[-1]
    codes = jnp.pad(codes, ((0, 0), (0, pad)))
    values = four_bit_rows(codes, scales.reshape(codes.shape[0], -1), codebook, q.block_size, dtype)
    return values[:, :n].reshape(q.shape)


def four_bit_rows(
    codes: UInt8[Array, "*rows bytes"],
    scales: Float32[Array, "*rows blocks"],
    codebook: np.ndarray,
    block_size: int,
    dtype: Any,
) -> Float[Array, "*rows values"]:
    """Rows of whole blocks: both nibbles of a byte by one shift, a look-up among 16, and the block's scale.

    Of seven ways to say this, the one that XLA's CPU compiler does about equally well for AVX2 and AVX-512 (4.2 ms for
    4096 x 4096 where x + 1 takes 4.5). A gather of pairs from 256 takes 3.1 and 9.7 ms, a tree of selects 44.
    """
    shifts = jnp.asarray([4, 0], jnp.int32)
    code = (codes.reshape(*scales.shape, -1, 1).astype(jnp.int32) >> shifts) & 15
    values = jnp.asarray(codebook).at[code].get(mode="promise_in_bounds") * scales[..., None, None]
    return values.astype(dtype).reshape(*codes.shape[:-1], -1)


def resolve_scales(q: QuantizedArray) -> Float32[Array, "*stack_and_blocks"]:
    """The float32 scales: second level undone."""
    if q.scales2 is None:
        return q.scales  # pyright: ignore[reportReturnType]
    stack, codes = q.stack, q.scales
    assert codes is not None
    size = math.prod(codes.shape[len(stack) :])
    if q.map8 is None:
        values = lookup8(codes)
    else:
        flat = codes.reshape(*stack, size).astype(jnp.int32)
        values = jnp.take_along_axis(q.map8, flat, axis=-1).reshape(codes.shape)
    # The few second-level scales are spread to the shape of the codes, not the codes flattened to theirs: codes that
    # are split over a mesh stay where they are.
    second = jnp.repeat(q.scales2, GROUP, axis=-1)[..., :size].reshape(codes.shape)
    offset = q.offset.reshape(*stack, *[1] * (codes.ndim - len(stack)))  # pyright: ignore[reportOptionalMemberAccess]
    # The product is rounded before the sum, as in the original; a fused multiply-add would round once.
    return rounded(values * second) + offset
