"""Parts of a quantised array: only what is looked up is dequantised."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorax_kernels.nf4.array import GROUP, QuantizedArray
from lorax_kernels.nf4.dequantize import four_bit_rows
from lorax_kernels.nf4.dynamic8 import lookup8
from lorax_kernels.nf4.formats import FORMATS
from lorax_kernels.nf4.layouts import canonical
from lorax_kernels.nf4.rounding import rounded


def take(q: QuantizedArray, indices: Int[Array, "*batch"], axis: int = 0) -> Float[Array, "*out"]:
    """Rows `indices` of one slice along `axis`, in float32: shape `(*batch, *the other axes)`.

    Args:
        q: an array without stacked axes.
        indices: within range; what lies outside is the caller's to mend.
        axis: the axis of the slice that the indices count along.
    """
    q, shape = canonical(q), q.slice_shape
    if q.is_regular and axis == 0 and len(shape) > 1:
        return _whole_rows(q, indices)
    if not q.is_regular or q.format in ("nf4", "fp4"):
        return elements(q, _flat_index(shape, indices, axis))
    codes = jnp.take(q.codes, indices, axis=axis)
    codes = jnp.moveaxis(codes, range(axis, axis + indices.ndim), range(indices.ndim))
    if q.format == "bf16":
        return codes.astype(jnp.float32)
    assert q.scales is not None
    if axis == len(shape) - 1:
        scales = jnp.broadcast_to(q.scales, codes.shape)
    else:
        scales = jnp.take(q.scales, indices, axis=axis)
        scales = jnp.moveaxis(scales, range(axis, axis + indices.ndim), range(indices.ndim))[..., None]
    return codes.astype(jnp.float32) * (scales * jnp.float32(1 / 127))


def _whole_rows(q: QuantizedArray, indices: Array) -> Array:
    """Rows of whole blocks: a gather of bytes and one of scales."""
    codes = q.codes[indices]
    if q.format == "bf16":
        return codes.astype(jnp.float32)
    assert q.scales is not None
    scales = q.scales[indices]
    if q.scales2 is not None:
        size = math.prod(q.scales.shape[1:])
        within = jnp.arange(size, dtype=jnp.int32).reshape(q.scales.shape[1:])
        first = indices.astype(jnp.int32).reshape(*indices.shape, *[1] * within.ndim) * size
        scales = _resolve(q, scales, first + within)
    if q.format == "int8":
        return codes.astype(jnp.float32) * (scales * jnp.float32(1 / 127))[..., None]
    codebook = FORMATS[q.format].codebook
    assert codebook is not None
    return four_bit_rows(codes, scales, codebook, q.block_size, jnp.float32)


def _flat_index(shape: tuple[int, ...], indices: Array, axis: int) -> Array:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    rest = [i for i in range(len(shape)) if i != axis]
    index = indices.astype(jnp.int32).reshape(*indices.shape, *[1] * len(rest)) * strides[axis]
    for place, i in enumerate(rest):
        steps = jnp.arange(shape[i], dtype=jnp.int32) * strides[i]
        index = index + steps.reshape(*[1] * (indices.ndim + place), shape[i], *[1] * (len(rest) - place - 1))
    return index


def elements(q: QuantizedArray, index: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Single values of one slice by their positions along the flattened array, in float32."""
    q = canonical(q)
    codebook = FORMATS[q.format].codebook
    if codebook is None:
        codes = q.codes.reshape(-1)[index].astype(jnp.float32)
        if q.scales is None:
            return codes
        return codes * (q.scales.reshape(-1)[index // q.slice_shape[-1]] * jnp.float32(1 / 127))
    assert q.scales is not None
    byte = q.codes.reshape(-1)[index // 2]
    code = jnp.where(index % 2 == 0, byte >> 4, byte & 15).astype(jnp.int32)
    block = index // q.block_size
    scales = q.scales.reshape(-1)[block]
    if q.scales2 is not None:
        scales = _resolve(q, scales, block)
    return jnp.asarray(codebook)[code] * scales


def _resolve(q: QuantizedArray, codes: Array, block: Array) -> Array:
    """Float32 scales from their codes and their positions among the slice's scales."""
    assert q.scales2 is not None
    assert q.offset is not None
    values = lookup8(codes) if q.map8 is None else q.map8[codes.astype(jnp.int32)]
    return rounded(values * q.scales2[block // GROUP]) + q.offset
