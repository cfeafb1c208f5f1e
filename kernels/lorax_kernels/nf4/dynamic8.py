"""Blockwise 8 bit with a dynamic map, as bitsandbytes' CPU library computes it: scales of scales, Adam's moments.

    code(x) = table[trunc((x / absmax + 1) * 32767.5 + 0.5)]      table[i] = the map's entry nearest to -1 + 2 i / 65535

The normalised value is first rounded to 16 bits, so two values nearer than 1.5e-5 of the maximum share a code.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from lorax_kernels.nf4.codebooks import dynamic_map
from lorax_kernels.nf4.rounding import rounded

_STEPS = 65535


@functools.cache
def nearest_table(signed: bool = True) -> UInt8[np.ndarray, "65536"]:
    """For each of 65,536 equal steps from -1 to 1 the nearest entry of the map."""
    values = dynamic_map(signed)
    centres = np.arange(_STEPS + 1, dtype=np.float32) * np.float32(2 / _STEPS) - np.float32(1)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    return np.searchsorted(middles, centres, side="left").astype(np.uint8)


def quantize_blocks(
    x: Float32[Array, "*n block"], signed: bool = True
) -> tuple[UInt8[Array, "*n block"], Float32[Array, "*n"]]:
    """Codes and absolute maxima of rows that are whole blocks (pad with zeros: they change no maximum)."""
    absmax = jnp.max(jnp.abs(x), axis=-1)
    # The product is an operation of its own: joined with the sum into a fused multiply-add it would round once.
    scaled = rounded(x * (1.0 / absmax)[..., None])
    # NaN, from a block of zeros, takes the first code, as it does in the original.
    scaled = jnp.where(jnp.isnan(scaled), jnp.float32(-1), jnp.clip(scaled, -1.0, 1.0))
    index = (rounded((scaled + 1.0) * 32767.5) + 0.5).astype(jnp.int32)
    codes = jnp.asarray(nearest_table(signed)).at[index].get(mode="promise_in_bounds")
    return codes, absmax


def dequantize_blocks(
    codes: UInt8[Array, "*n block"], absmax: Float32[Array, "*n"], signed: bool = True
) -> Float32[Array, "*n block"]:
    """The values of rows of codes."""
    return lookup8(codes, signed) * absmax[..., None]


def lookup8(codes: UInt8[Array, "*n"], signed: bool = True) -> Float32[Array, "*n"]:
    """Entries of the dynamic map."""
    return jnp.asarray(dynamic_map(signed)).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
