"""`Quantized`: a frozen weight in blocks of 4 or 8 bits, as a leaf of the user's own tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax.weights import Structured, register
from lorax_kernels.nf4 import QuantizedArray, dequantize


@register
@dataclass(frozen=True, eq=False)
class Quantized(Structured):
    """A weight that is kept in blocks: W = transpose(dequantize(array)), stacked axes in front on both sides.

    array: the blocks. A kernel (in, out) is held as (out, in), so that blocks run along the inputs of one output:
        the orientation in which torch models are quantised, and in which matmul kernels read it.
    order: axis k of a slice of `array` is axis `order[k]` of a slice of the weight.

    Nothing of it trains. `lorax.quantize` makes it; a low-rank change may stand on top, `LowRank(base=Quantized)`.

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
    """

    array: QuantizedArray
    order: tuple[int, ...]

    META: ClassVar[frozenset[str]] = frozenset({"order"})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape; the stacked axes are whatever the arrays have in front."""
        sizes = [0] * len(self.order)
        for axis, size in zip(self.order, self.array.slice_shape, strict=True):
            sizes[axis] = size
        return (*self.array.stack, *sizes)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that hold it."""
        return self.array.nbytes

    def dense(self) -> jax.Array:
        return to_weight(dequantize(self.array), self.order)

    def __repr__(self) -> str:
        return f"Quantized(shape={self.shape}, format={self.array.format}, {self.array.bits:.3f} bits)"


def to_weight(stored: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """The stored axes in the weight's order; axes in front of the last `len(order)` stay."""
    front = stored.ndim - len(order)
    inverse = [order.index(axis) + front for axis in range(len(order))]
    return jnp.transpose(stored, (*range(front), *inverse))


def to_stored(weight: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_weight`."""
    front = weight.ndim - len(order)
    return jnp.transpose(weight, (*range(front), *(axis + front for axis in order)))
