"""`Packed`: a quantised weight inside the walk. It stays packed until something uses it up.

    W = views(marks(transpose(dequantize(array))))

Marks are operations without shape (casts, constants, names); views change the shape. Both are noted down, not
computed. A product then dequantises, uses and forgets: inside `jax.checkpoint`, so that the backward pass dequantises
again instead of keeping 16-bit weights from the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lorax.lift.values import Unsupported, Value
from lorax.quantized import Quantized, to_weight
from lorax_kernels.nf4 import QuantizedArray, dequantize, resolve_scales

Step = Callable[..., jax.Array]


@dataclass(frozen=True, eq=False)
class Packed(Value):
    """A quantised weight, and what is still to be done to it when it is dequantised.

    array, order: as in the leaf `Quantized`.
    marks: functions `(w, *extras) -> w` of elementwise operations; they commute with everything else here.
    views: functions `w -> w` that change the shape, after the marks.
    extras: the scalars that marks take.
    final: (shape without stacked axes, or whole shape once there are views; dtype) after marks and views.
    """

    array: QuantizedArray
    extras: tuple[jax.Array, ...]
    order: tuple[int, ...]
    marks: tuple[Step, ...]
    views: tuple[Step, ...]
    final_shape: tuple[int, ...] | None
    final_dtype: Any
    path: str

    @classmethod
    def open(cls, leaf: Quantized, path: str) -> Packed:
        # The weight does not train: no cotangent is made for its scales.
        array = jax.tree.map(jax.lax.stop_gradient, leaf.array)
        return cls(array, (), leaf.order, (), (), None, leaf.dtype, path)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The weight's shape before any view."""
        return Quantized(self.array, self.order).shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape if self.final_shape is None else self.final_shape

    @property
    def dtype(self) -> Any:
        return self.final_dtype

    def marked(self, x: jax.Array) -> jax.Array:
        """The marks on values of the weight (all of them, or some)."""
        return self.marked_with(x, *self.extras)

    def marked_with(self, x: jax.Array, *extras: jax.Array) -> jax.Array:
        """The marks with their scalars given from outside."""
        for mark in self.marks:
            x = mark(x, *extras)
        return x

    def dense(self) -> jax.Array:
        x = self.marked(to_weight(dequantize(self.array), self.order))
        for view in self.views:
            x = view(x)
        return x

    def before_scan(self) -> Packed:
        if self.views or not self.array.stack:
            raise Unsupported(
                "a quantised weight can be scanned over as it is and along a stacked axis; "
                "pass fn and args to quantize, so that the stacked axes are read from the trace"
            )
        return self

    def viewed(self, view: Step, shape: tuple[int, ...]) -> Packed:
        """The weight with one more view."""
        return replace(self, views=(*self.views, view), final_shape=tuple(shape))

    def before_shards(self) -> Packed:
        """The weight with one level of scales, so that codes and scales can be split along the same axes."""
        array = replace(self.array, placement=None)  # inside, every device has a part that is whole to it
        if array.scales2 is not None:
            array = replace(array, scales=resolve_scales(array), scales2=None, offset=None, map8=None)
        return replace(self, array=array)

    def specs(self, spec: PartitionSpec) -> Any:
        """Codes and scales are split along the stored axes as the weight is along its own."""
        if self.views or self.array.scales2 is not None:
            raise Unsupported("a quantised weight that was reshaped cannot enter a shard_map; pass it as it is")
        front = len(self.array.stack)
        names = [*spec, *[None] * (len(self.shape) - len(spec))]
        stored = [*names[:front], *(names[front + axis] for axis in self.order)]
        if self.array.layout == "tpu":
            # Words are (inputs / 8, outputs), scales (outputs, blocks of inputs).
            stack, (outs, ins) = stored[:front], stored[front:]
            array = replace(self.array, codes=PartitionSpec(*stack, ins, outs), scales=PartitionSpec(*stored))
            return replace(self, array=array, extras=tuple(PartitionSpec() for _ in self.extras))
        if not self.array.is_regular:
            if any(name is not None for name in stored[front:]):
                raise Unsupported(
                    f"its last stored axis is no multiple of {self.array.block_size}, so it cannot be split"
                )
            stored = [*stored[:front], None]
        codes = PartitionSpec(*stored)
        scales = codes if self.array.format != "int8" else PartitionSpec(*stored[:-1])
        array = replace(self.array, codes=codes, scales=None if self.array.scales is None else scales)
        return replace(self, array=array, extras=tuple(PartitionSpec() for _ in self.extras))


@dataclass(frozen=True, eq=False)
class Still(Value):
    """The tangent of a weight that does not move: zeros of its shape that are not built."""

    aval: Any
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype

    def dense(self) -> jax.Array:
        return jax.numpy.zeros(self.shape, self.dtype)


jax.tree_util.register_dataclass(
    Packed,
    data_fields=["array", "extras"],
    meta_fields=["order", "marks", "views", "final_shape", "final_dtype", "path"],
)
jax.tree_util.register_dataclass(Still, data_fields=[], meta_fields=["aval", "path"])
