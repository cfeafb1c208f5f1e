"""`Banked`: a weight with many adapters' changes inside the walk, and the one that each row of activations gets.

    x @ (W + s_i A_i B_i) = x @ W + s_i (x @ A_i) @ B_i           i chosen by the row, a traced number

A scan over layers takes one layer out of every scanned array. Of a bank that would be a copy of all adapters for each
layer, though a batch needs a few. So the value carries the bank twice, as one and the same arrays:

    a, b      (*stack, total, k) and (*stack, total, n): sliced as W is; only gradients go through them
    whole     all layers at once, never sliced, without gradients: what is read, with `at`, the layer's number

`product` computes from `whole` and differentiates with respect to `a` and `b`; slices of `a` and `b` that nothing
reads are dropped by the compiler, and the gradient of a layer has the size of a layer.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from lorax.bank import Selected
from lorax.lift import fetched
from lorax.lift.values import Unsupported, Value, densify
from lorax_kernels.multi_lora import Segments, grouped
from lorax_kernels.placement import Placement


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """What a scan closes over: arrays that are the same in every step.

    a, b: `(layers, total, k)` and `(layers, total, n)`; scale: `(layers, slots)`; start, rank: `(slots,)`.
    ids, weights: `(*lead, several)`.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    start: jax.Array
    rank: jax.Array
    ids: jax.Array
    weights: jax.Array


@dataclass(frozen=True, eq=False)
class Banked(Value):
    """A weight with a bank's changes.

    base: the weight without them; its shape and dtype are the value's.
    a, b, at, whole: see the module; `at` is int32 `(*stack)`, the layer's number in `whole`.
    stack, inputs, outputs: the weight's axes that are a's and b's leading ones, a's features and b's, each in the
        order in which they are stored. Axes of size one may be in none.
    placement: as in `Bank`; on a mesh the rows in use are fetched from `a` and `b`, see `fetched`.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    at: jax.Array
    whole: Whole
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    max_rank: int
    path: str
    placement: Placement | None = None

    @classmethod
    def open(cls, leaf: Selected, base: Any, path: str) -> Banked:
        bank = leaf.bank
        s, axes = len(bank.axes.stack), bank.axes
        layers = bank.A.shape[:s]
        a, b = (x.reshape(*x.shape[: s + 1], -1) for x in (bank.A, bank.B))
        scale = bank.scale.reshape(-1, bank.slots)
        whole = Whole(*_whole(a, b), scale, bank.start, bank.rank, leaf.ids, leaf.weights)
        at = jnp.arange(math.prod(layers), dtype=jnp.int32).reshape(layers)
        return cls(base, a, b, at, whole, axes.stack, axes.inputs, axes.outputs, bank.max_rank, path, bank.placement)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def before_scan(self) -> Banked:
        if self.stack[:1] != (0,):
            raise Unsupported("its first axis is not a stacked one, so a scan over it would cut through the factors")
        return replace(self, base=self.base.before_scan()) if isinstance(self.base, Value) else self

    def inside_scan(self) -> Banked:
        base = self.base.inside_scan() if isinstance(self.base, Value) else self.base
        stack, inputs, outputs = (tuple(axis - 1 for axis in axes) for axes in self._axes())
        return replace(self, base=base, stack=stack[1:], inputs=inputs, outputs=outputs)

    def before_shards(self) -> Banked:
        base = self.base.before_shards() if isinstance(self.base, Value) else self.base
        return replace(self, base=base, placement=None)  # inside, a device has its own part and no other

    def specs(self, spec: PartitionSpec) -> Any:
        """Factors are split along the weight's mesh axes, the total rank never; who is who is on every device."""
        names = [*spec, *[None] * (self.ndim - len(spec))]
        layers, a_axis, b_axis = [names[i] for i in self.stack], self._split(names, "a"), self._split(names, "b")
        split: list[Any] = [PartitionSpec(None, None, axis) for axis in (a_axis, b_axis)]
        same: list[Any] = [PartitionSpec()] * 5
        whole = Whole(*split, *same)
        base = self.base.specs(spec) if isinstance(self.base, Value) else spec
        a, b = PartitionSpec(*layers, None, a_axis), PartitionSpec(*layers, None, b_axis)
        return replace(self, base=base, a=a, b=b, at=PartitionSpec(*layers), whole=whole)

    def _split(self, names: list[Any], which: str) -> Any:
        """The mesh axes of a factor's features, which are stored as one axis: the first of theirs may be split."""
        axes = self.features(which)
        if any(names[axis] is not None for axis in axes[1:]):
            raise Unsupported("of several axes that meet in one product, the first alone can be split over a mesh")
        return names[axes[0]] if axes else None

    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.stack, self.inputs, self.outputs

    def features(self, which: str) -> tuple[int, ...]:
        """The weight's axes that belong to a factor."""
        return self.inputs if which == "a" else self.outputs

    def moved(self, base: Any, place: Any) -> Banked:
        """The value on another base, each axis at `place(axis)`."""
        stack, inputs, outputs = (tuple(place(axis) for axis in axes) for axes in self._axes())
        return replace(self, base=base, stack=stack, inputs=inputs, outputs=outputs)

    def on_stack(self, base: Any, function: Any) -> Banked:
        """The value on another base, one function for everything that has the stacked axes in front."""
        return replace(self, base=base, a=function(self.a), b=function(self.b), at=function(self.at))

    def on_features(self, base: Any, which: str, function: Any) -> Banked:
        """The value on another base, one factor's features (as the weight has them) through a function."""
        s, sizes = len(self.stack), [self.shape[axis] for axis in self.features(which)]
        x = self.a if which == "a" else self.b
        new = function(x.reshape(*x.shape[: s + 1], *sizes), s + 1)
        new = new.reshape(*x.shape[: s + 1], -1)
        out = replace(self, base=base, **{which: new})
        a, b = _whole(out.a, out.b)
        # What is read is what was cut: the layers that are left, numbered anew.
        layers = self.at.reshape(-1)
        whole = replace(self.whole, a=a, b=b, scale=self.whole.scale[layers])
        at = jnp.arange(layers.size, dtype=jnp.int32).reshape(self.at.shape)
        return replace(out, whole=whole, at=at)

    def scaled(self, base: Any, factor: Any) -> Banked:
        """The value times a number."""
        scale = self.whole.scale * jnp.asarray(factor).astype(self.whole.scale.dtype)
        return replace(self, base=base, whole=replace(self.whole, scale=scale))

    def dense(self) -> jax.Array:
        """The weight of one example, of which every row is one identity row's product."""
        if self.whole.ids.ndim != 1:
            raise Unsupported("each row has a weight of its own; there is no dense one")
        ins = [self.shape[axis] for axis in self.inputs]
        k, s = math.prod(ins), len(self.stack)
        layers = [self.shape[axis] for axis in self.stack]
        rows = jnp.broadcast_to(jnp.eye(k, dtype=self.dtype), (*layers, k, k))
        delta = self.product(jnp.zeros((*layers, k, self.b.shape[-1]), self.dtype), rows, "a", None)
        delta = delta.reshape(*layers, *ins, *(self.shape[axis] for axis in self.outputs))
        order = (*self.stack, *self.inputs, *self.outputs)
        ones = [axis for axis in range(self.ndim) if axis not in order]
        delta = jnp.expand_dims(delta, tuple(range(delta.ndim, delta.ndim + len(ones))))
        assert s + len(self.inputs) + len(self.outputs) + len(ones) == self.ndim
        order = (*order, *ones)
        return densify(self.base) + jnp.transpose(delta, [order.index(axis) for axis in range(self.ndim)])

    def product(self, y: jax.Array, x: jax.Array, first: str, precision: Any) -> jax.Array:
        """y + what the adapters add to x @ W (first = "a") or x @ W^T (first = "b").

        x, y: `(*stack, *rows, features)`: stacked axes in front, features of each factor merged.
        """
        step = functools.partial(_one_layer, self.max_rank, first, precision, self.placement)
        for _ in self.stack:
            step = jax.vmap(step, (0, 0, 0, 0, 0, None))
        return step(y, x, self.a, self.b, self.at, self.whole)


jax.tree_util.register_dataclass(
    Banked,
    data_fields=["base", "a", "b", "at", "whole"],
    meta_fields=["stack", "inputs", "outputs", "max_rank", "path", "placement"],
)


def _whole(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    stop = jax.lax.stop_gradient
    return stop(a.reshape(-1, *a.shape[-2:])), stop(b.reshape(-1, *b.shape[-2:]))


def _one_layer(
    max_rank: int,
    first: str,
    precision: Any,
    place: Placement | None,
    y: jax.Array,
    x: jax.Array,
    a: Any,
    b: Any,
    at: Any,
    whole: Whole,
) -> jax.Array:
    """One layer's change, adapter after adapter where an example has several."""
    lead = whole.ids.shape[:-1]
    groups = math.prod(lead)
    blocks = [z.reshape(groups, -1, z.shape[-1]) for z in (y, x)] if _shared(lead, x.shape[:-1]) else None
    if blocks is None:
        raise Unsupported(
            f"ids of shape {lead} choose an adapter for each row, and here the rows are {x.shape[:-1]}; give ids of "
            "their leading axes, or map over examples with jax.vmap"
        )
    out, rows = blocks
    total = whole.a.shape[1]
    flat = (whole.a.reshape(-1, whole.a.shape[-1]), whole.b.reshape(-1, whole.b.shape[-1]))
    scales = jax.lax.dynamic_index_in_dim(whole.scale, at, 0, keepdims=False)
    slots = whole.rank.shape[0]
    for j in range(whole.ids.shape[-1]):
        ids, weights = (z[..., j].reshape(groups) for z in (whole.ids, whole.weights))
        inside = (ids >= 0) & (ids < slots)
        safe = jnp.where(inside, ids, 0)
        rank = jnp.where(inside, whole.rank[safe], 0)
        start = whole.start[safe]
        weight = jnp.where(inside, scales[safe] * weights.astype(scales.dtype), 0)
        if place is None:
            out = _product((max_rank, first, precision), out, rows, a, b, *flat, start, at * total, rank, weight)
        else:
            turn = 1 if first == "a" else -1
            factors, names = (a, b)[::turn], place.core[::turn]
            out = fetched.product(place, max_rank, precision, out, rows, *factors, start, rank, weight, names)
    return out.reshape(y.shape)


def _shared(lead: tuple[int, ...], rows: tuple[int, ...]) -> bool:
    """Whether ids can be shared out: they are leading axes of the rows, or cut the first axis into equal blocks."""
    return rows[: len(lead)] == lead or (len(lead) == 1 and bool(rows) and rows[0] % lead[0] == 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(
    options: Any,
    y: Any,
    x: Any,
    a: Any,
    b: Any,
    all_a: Any,
    all_b: Any,
    start: Any,
    offset: Any,
    rank: Any,
    weight: Any,
) -> jax.Array:
    """The product from the arrays of all layers; `a` and `b` are there to be differentiated."""
    del a, b
    max_rank, first, precision = options
    where = start + offset
    if first == "b":
        all_a, all_b = all_b, all_a
    return grouped(x, all_a, all_b, Segments(where, where, rank, weight), max_rank, y, precision)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(options: Any, primals: Any, tangents: Any) -> Any:
    max_rank, first, precision = options
    y, x, _, _, all_a, all_b, start, offset, rank, weight = primals
    dy, dx, da, db, *_, dweight = tangents
    out = _product(options, *primals)
    if first == "b":
        (all_a, all_b), (da, db) = (all_b, all_a), (db, da)
    where = start + offset
    terms = (
        (dx, (dx, all_a, all_b), (where, where, rank, weight)),
        (da, (x, da, all_b), (start, where, rank, weight)),
        (db, (x, all_a, db), (where, start, rank, weight)),
        (dweight, (x, all_a, all_b), (where, where, rank, dweight)),
    )
    change = jnp.zeros_like(y) if isinstance(dy, SymbolicZero) else dy
    for moving, operands, segments in terms:
        if not isinstance(moving, SymbolicZero):
            # Each term is added onto the one before in the operation itself.
            change = grouped(*operands, Segments(*segments), max_rank, change, precision)
    return out, change
