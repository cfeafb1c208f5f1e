"""Arrays to blocks, bit for bit what bitsandbytes writes.

absmax = max |x| of a block      code = the codebook's entry nearest to x * (1 / absmax), the lower one on a tie
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, UInt8

from lorax_kernels.nf4.array import GROUP, QuantizedArray, is_regular
from lorax_kernels.nf4.dynamic8 import quantize_blocks
from lorax_kernels.nf4.formats import FORMATS, check
from lorax_kernels.nf4.mean import mean

# Below the least normal number processors and compilers may take a float for zero; such blocks are scaled up exactly.
_TINY = np.float32(2.0**-100)
_LEAST_NORMAL_BITS = 0x00800000
_FLOOR = np.float32(1e-38)  # what bitsandbytes divides by at least


def quantize(
    x: Float[Array, "*shape"],
    block_size: int = 64,
    double_quant: bool = True,
    format: str = "nf4",
    stack: int = 0,
) -> QuantizedArray:
    """Quantise an array in blocks along its flattened order.

    Args:
        x: float32, bfloat16 or float16, any shape; finite.
        block_size: 32, 64, 128 or 256 values to a scale (nf4, fp4).
        double_quant: keep the scales in 8 bits: 4.127 bits a value instead of 4.5 (nf4, fp4).
        format: `"nf4"`, `"fp4"`, `"int8"` (a scale for each row of the last axis) or `"bf16"`.
        stack: leading axes that hold independent arrays (scanned layers, experts): blocks, second-level groups and
            offset stay inside each.

    Returns:
        A `QuantizedArray`; deterministic, on x's device.

    Raises:
        ValueError: another dtype, format or block size, an empty array, or one that is concrete and not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_kernels import nf4
        >>> q = nf4.quantize(jnp.linspace(-1.0, 1.0, 256).reshape(2, 128))
        >>> q.codes.shape, nf4.dequantize(q).shape
        ((2, 64), (2, 128))

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; bitsandbytes 0.50.
    """
    x = jnp.asarray(x)
    check(format, block_size, str(x.dtype), x.shape, stack)
    if not isinstance(x, Tracer) and not bool(_all_finite(x)):
        raise ValueError(f"an array of shape {x.shape} holds NaN or infinity, which has no code; mend the weight first")
    return quantize_unchecked(x, block_size, double_quant, format, stack)


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantize_unchecked(x: Array, block_size: int, double_quant: bool, format: str, stack: int) -> QuantizedArray:
    """`quantize` without its checks; can be traced."""
    shape, dtype = x.shape, str(x.dtype)
    slice_shape = shape[stack:]
    whole = is_regular(slice_shape, format, block_size)
    meta = (len(slice_shape), None if whole else slice_shape, format, block_size, dtype)
    if format == "bf16":
        return QuantizedArray(x.astype(jnp.bfloat16), None, None, None, None, *meta)
    if format == "int8":
        return QuantizedArray(*_int8(x.astype(jnp.float32)), None, None, None, *meta)
    flat = x.reshape(math.prod(shape[:stack]), math.prod(slice_shape)).astype(jnp.float32)
    codes, absmax = four_bit(flat, block_size, format)
    scales, scales2, offset = jax.vmap(quantize_scales)(absmax) if double_quant else (absmax, None, None)
    front = shape[:stack]
    rows = (*front, *(slice_shape[:-1] if whole else ()), -1)
    scales2, offset = jax.tree.map(lambda a: a.reshape(*front, *a.shape[1:]), (scales2, offset))
    return QuantizedArray(codes.reshape(rows), scales.reshape(rows), scales2, offset, None, *meta)


def four_bit(
    x: Float32[Array, "slices n"], block_size: int, format: str
) -> tuple[UInt8[Array, "slices bytes"], Float32[Array, "slices blocks"]]:
    """Packed codes and absolute maxima; a last block that is not full is a block of its own."""
    slices, n = x.shape
    rest = n % block_size
    blocks = jnp.pad(x, ((0, 0), (0, -n % block_size))).reshape(slices, -1, block_size)
    # As integers, absolute values keep the order of the floats, the subnormal ones too.
    bits = jax.lax.bitcast_convert_type(blocks, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    top = jnp.max(bits, axis=-1)
    codes = nearest4(_normalised(blocks, bits, top, rest), format).reshape(slices, -1)[:, : n + n % 2]
    if n % 2:
        # The spare half of the last byte is the code of zero.
        codes = codes.at[:, n:].set(int(np.argmin(np.abs(_codebook(format)))))
    pairs = codes.reshape(slices, -1, 2)
    if rest:
        # The maximum of a block that is not full is kept from being zero.
        floor = jnp.uint32(_FLOOR.view(np.uint32))
        top = top.at[:, -1].set(jnp.maximum(top[:, -1], floor))
    return pairs[..., 0] << 4 | pairs[..., 1], jax.lax.bitcast_convert_type(top, jnp.float32)


def _normalised(blocks: Array, bits: Array, top: Array, rest: int) -> Float32[Array, "slices blocks block_size"]:
    """x / absmax in [-1, 1]: times the inverse, but a division in a block that is not full."""
    tiny = (top < jnp.uint32(_TINY.view(np.uint32)))[..., None]
    mantissa = bits.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-49)
    sign = jax.lax.bitcast_convert_type(blocks, jnp.int32) < 0
    # Times 2^100, which is exact: from the integer where the float is subnormal.
    subnormal = bits < _LEAST_NORMAL_BITS
    raised = jnp.where(subnormal, jnp.where(sign, -mantissa, mantissa), blocks * jnp.float32(2.0**100))
    x = jnp.where(tiny, raised, blocks)
    top_raised = jnp.where(
        top < _LEAST_NORMAL_BITS,
        top.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-49),
        jax.lax.bitcast_convert_type(top, jnp.float32) * jnp.float32(2.0**100),
    )
    floor = jnp.float32(np.float64(_FLOOR) * 2.0**100)
    absmax = jnp.where(tiny[..., 0], jnp.maximum(top_raised, floor), jax.lax.bitcast_convert_type(top, jnp.float32))
    scaled = x * (1.0 / absmax)[..., None]
    if rest:
        # XLA divides by a broadcast number as a product with its inverse, which rounds twice. The maximum is the
        # block's own whatever x is, and no broadcast to a compiler.
        last = x[:, -1] / jnp.maximum(absmax[:, -1, None], jnp.abs(x[:, -1]))
        scaled = scaled.at[:, -1].set(last)
    return jnp.clip(scaled, -1.0, 1.0)


def _codebook(format: str) -> np.ndarray:
    codebook = FORMATS[format].codebook
    assert codebook is not None, f"{format} has no codebook"
    return codebook


def nearest4(scaled: Float32[Array, "*n"], format: str) -> UInt8[Array, "*n"]:
    """The code of the nearest entry: how many midpoints lie below. A value on a midpoint takes the lower entry."""
    codebook = _codebook(format)
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    middles = (values[:-1] + values[1:]) / np.float32(2)
    rank = sum((scaled > middle).astype(jnp.uint8) for middle in middles)
    rank = jnp.asarray(rank)
    if (order == np.arange(16)).all():
        return rank
    return jnp.asarray(order.astype(np.uint8)).at[rank.astype(jnp.int32)].get(mode="promise_in_bounds")


def quantize_scales(
    absmax: Float32[Array, "blocks"],
) -> tuple[UInt8[Array, "blocks"], Float32[Array, "groups"], Float32[Array, ""]]:
    """Double quantisation of one slice's scales: 8-bit codes, second-level scales, and the mean taken off first."""
    n = absmax.shape[0]
    offset = mean(absmax)
    codes, scales2 = quantize_blocks(jnp.pad(absmax - offset, (0, -n % GROUP)).reshape(-1, GROUP))
    return codes.reshape(-1)[:n], scales2, offset


def _int8(x: Float32[Array, "*rows n"]) -> tuple[Array, Float32[Array, "*rows"]]:
    absmax = jnp.max(jnp.abs(x), axis=-1)
    # A row of zeros, or of numbers so small that 127 / absmax is no float32, is a row of zeros.
    factor = 127.0 / jnp.where(absmax < 1e-36, jnp.float32(jnp.inf), absmax)
    return jnp.round(x * factor[..., None]).astype(jnp.int8), absmax
