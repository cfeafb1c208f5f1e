"""Arrays in 8 bit with a float32 scale for each block of consecutive values.

    absmax = max |x| of a block      code = the entry of the dynamic map nearest to x / absmax

Two ways of finding the entry exist in the wild, and they differ:

    nearest   the entry that is nearest, the lower one on a tie (the paper; bitsandbytes on a GPU). Zero stays zero.
    table     x / absmax is rounded to 16 bits first (bitsandbytes on a CPU). Everything smaller than 1.5e-5 of a
              block's maximum, zero included, comes back as about 2e-5 of it.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from lorax.errors import LoraxError
from lorax_kernels.nf4.codebooks import dynamic_map
from lorax_kernels.nf4.dynamic8 import dequantize_blocks, quantize_blocks

Rounding = Literal["nearest", "table"]

# The least normal float32. Processors may take less for zero, and what is below it may have no inverse.
_FLOOR = float(np.finfo(np.float32).tiny)


class Blockwise(NamedTuple):
    """An array in 8 bit.

    codes   uint8, the array's own shape, so that it can be sharded as the array is
    absmax  float32, one for each block of the flattened array: `(*lead, last / block)` where blocks divide the last
            axis, `(ceil(size / block),)` where they do not; flattened, the two are the same numbers in the same order
    """

    codes: UInt8[Array, "*shape"]
    absmax: Float32[Array, "*blocks"]


def quantize_blockwise(
    x: Float[Array, "*shape"], block_size: int = 256, signed: bool = True, rounding: Rounding = "nearest"
) -> Blockwise:
    """Quantise an array in blocks along its flattened order; a last block that is not full is a block of its own.

    Args:
        x: any floating dtype and shape; computed in float32.
        block_size: values to a scale.
        signed: the map for values of both signs, or the finer one for values that are never negative.
        rounding: see the module's docstring.

    Raises:
        LoraxError: a block size below 1, or an unknown rounding.

    Example:
        >>> import jax.numpy as jnp
        >>> q = quantize_blockwise(jnp.array([0.5, 0.0, -2.0]), block_size=2)
        >>> q.codes, q.absmax
        (Array([255, 127,   0], dtype=uint8), Array([0.5, 2. ], dtype=float32))
    """
    check_blocks(block_size, rounding)
    blocks = _to_blocks(x.astype(jnp.float32), block_size)
    if rounding == "table":
        codes, absmax = quantize_blocks(blocks, signed)
    else:
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        scaled = blocks * (1.0 / jnp.maximum(absmax, _FLOOR))[..., None]
        codes = nearest8(jnp.clip(scaled, -1.0, 1.0), signed)
    return Blockwise(_from_blocks(codes, x.shape), absmax)


def dequantize_blockwise(q: Blockwise, block_size: int = 256, signed: bool = True) -> Float32[Array, "*shape"]:
    """The values of `quantize_blockwise`'s result, in its shape: map[code] * absmax.

    Example:
        >>> import jax.numpy as jnp
        >>> y = dequantize_blockwise(quantize_blockwise(jnp.array([[0.0, 0.25, 1.0]])))
        >>> [f"{value:.3f}" for value in y[0].tolist()]
        ['0.000', '0.248', '1.000']
    """
    codes = _to_blocks(q.codes, block_size)
    return _from_blocks(dequantize_blocks(codes, q.absmax, signed), q.codes.shape)


def zeros_blockwise(x: Float[Array, "*shape"], block_size: int, signed: bool) -> Blockwise:
    """An array of zeros, quantised, in the shape (and, outside `jit`, the sharding) of `x`."""
    zero = int(np.argmin(np.abs(dynamic_map(signed))))
    return Blockwise(jnp.full_like(x, zero, dtype=jnp.uint8), jnp.zeros(_scales(x.shape, block_size), jnp.float32))


def nearest8(x: Float32[Array, "*n"], signed: bool = True) -> UInt8[Array, "*n"]:
    """The code of the map's entry nearest to each x in [-1, 1]: how many midpoints lie below it.

    The upper half of a float's bits tells the count but for one midpoint at most, which a comparison settles: two
    small lookups instead of 255 comparisons.
    """
    below, middles = _cells(signed)
    key = (jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.int32)
    count = jnp.asarray(below).at[key].get(mode="promise_in_bounds")
    middle = jnp.asarray(middles).at[count.astype(jnp.int32)].get(mode="promise_in_bounds")
    return count + (x > middle).astype(jnp.uint8)


def check_blocks(block_size: int, rounding: str) -> None:
    """Refuse what no block can be.

    Raises:
        LoraxError: a block size below 1, or an unknown rounding.
    """
    if block_size < 1:
        raise LoraxError(f"block_size {block_size}: give at least 1; 256 is what 8-bit optimizers use")
    if rounding not in ("nearest", "table"):
        raise LoraxError(f"rounding {rounding!r}: give 'nearest', or 'table' to equal bitsandbytes on a CPU")


@functools.cache
def _cells(signed: bool) -> tuple[UInt8[np.ndarray, "keys=65536"], Float32[np.ndarray, "entries=256"]]:
    """For each upper half of a float32, the midpoints below all floats that share it; and the midpoints."""
    values = dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = bits.view(np.float32), (bits | 0xFFFF).view(np.float32)
    below = np.searchsorted(middles, np.minimum(*ends), side="left").astype(np.uint8)
    return below, np.append(middles, np.float32(np.inf))


def _scales(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    if shape and shape[-1] % block_size == 0:
        return (*shape[:-1], shape[-1] // block_size)
    return (-(-math.prod(shape) // block_size),)


def _to_blocks(x: Array, block_size: int) -> Array:
    # Splitting the last axis keeps the others, and how they are sharded; flattening would gather them.
    if x.shape and x.shape[-1] % block_size == 0:
        return x.reshape(*_scales(x.shape, block_size), block_size)
    return jnp.pad(x.reshape(-1), (0, -x.size % block_size)).reshape(-1, block_size)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)
