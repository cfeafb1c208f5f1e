"""`QuantizedArray`: an array in blocks, each with its own scale. A pytree that scan, vmap and jit can take apart.

    value[i] = codebook[code[i]] * scale[i // block_size]                        one level of scales
    scale[j] = map8[scale_code[j]] * scale2[j // 256] + offset                   double quantisation

Elements are counted along the flattened array (row-major), inside each stacked slice. Two 4-bit codes share a byte,
the earlier one in the high half: bitsandbytes' order. The sizes of the stacked axes are read off the arrays, so a
slice, or one step of a scan, is the same structure with fewer axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Num

from lorax_kernels.nf4.codebooks import FOUR_BIT
from lorax_kernels.placement import Placement

GROUP = 256  # scales that share a second-level scale


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A blockwise quantised array; `quantize` makes it, `dequantize` undoes it.

    codes: the codes, `(*stack, *rows, columns / 2)` where whole blocks fit into the last axis (so that the array can be
        split along its axes), else flat, `(*stack, bytes)`. The order of the bytes is the same. int8 and bf16 have one
        element for each value.
    scales: float32, or their 8-bit codes; `(*stack, *rows, columns / block_size)`, or flat; None for bf16.
    scales2: second-level scales, one for each 256 scales of a slice; None without double quantisation.
    offset: the mean of a slice's scales, subtracted before they are quantised; None without double quantisation.
    map8: the codebook of the scales where a file brought its own; None for `dynamic_map()`.
    core_ndim: how many axes a slice has, without the stacked ones.
    flat_shape: the shape of a slice where the codes are flat, else None.
    format: a row of `lorax_kernels.nf4.FORMATS`.
    block_size: values that share a scale.
    dtype_name: the dtype of the array that was quantised, and of what `dequantize` gives.
    layout: `"rows"`, the order above, or `"tpu"`: int32 words `(*stack, columns / 8, rows)`, see `layouts`.
    placement: how a slice lies on a mesh, for kernels; None where there is none, or the compiler is to decide.
    """

    codes: Num[Array, "*stack_and_bytes"]
    scales: Num[Array, "*stack_and_blocks"] | None
    scales2: Float32[Array, "*stack groups"] | None
    offset: Float32[Array, "*stack"] | None
    map8: Float32[Array, "*stack 256"] | None
    core_ndim: int
    flat_shape: tuple[int, ...] | None
    format: str
    block_size: int
    dtype_name: str
    layout: str = "rows"
    placement: Placement | None = None

    @property
    def is_regular(self) -> bool:
        """Whether the codes keep the array's own axes: whole blocks fit into the last one."""
        return self.flat_shape is None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        core = self.core_ndim if self.is_regular else 1
        return tuple(self.codes.shape[: self.codes.ndim - core])

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one slice. Read off the codes where they keep the axes: a part of them is a smaller array."""
        if self.flat_shape is not None:
            return self.flat_shape
        if self.layout == "tpu":
            words, rows = self.codes.shape[-2:]
            return (rows, 8 * words)
        *rows, last = self.codes.shape[self.codes.ndim - self.core_ndim :]
        return (*rows, last * self.values_per_code)

    @property
    def values_per_code(self) -> int:
        return 2 if self.format in FOUR_BIT else 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.slice_shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.dtype_name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that hold it."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits a value, everything counted: 4.127 for NF4 with double quantisation."""
        return 8.0 * self.nbytes / math.prod(self.shape)

    def __repr__(self) -> str:
        return f"QuantizedArray(shape={self.shape}, {self.format}, {self.bits:.3f} bits, dtype={self.dtype_name})"


def is_regular(slice_shape: tuple[int, ...], format: str, block_size: int) -> bool:
    """Whether blocks never cross a row of the last axis, so that codes and scales keep the array's axes."""
    return bool(slice_shape) and (format not in FOUR_BIT or slice_shape[-1] % block_size == 0)


jax.tree_util.register_dataclass(
    QuantizedArray,
    data_fields=["codes", "scales", "scales2", "offset", "map8"],
    meta_fields=["core_ndim", "flat_shape", "format", "block_size", "dtype_name", "layout", "placement"],
)
