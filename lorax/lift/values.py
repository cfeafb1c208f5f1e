"""What a structured weight is while a function is evaluated: a `Value`, the dense array that is never built.

`Factored` keeps its factors in a form that broadcasts against the weight, the rank last:

    W[i, j, ...] = base[i, j, ...] + scale[i, j, ...] * sum_r a[i, j, ..., r] * b[i, j, ..., r]

where a factor has size one along every axis that it does not depend on. Transposes, reshapes and slices of W are
then the same operation on base, a and b, and a matmul reads off the shapes which factor to meet first. An axis
along which both factors are full is a stacked one.

`Scaled` is a weight times an array that broadcasts against it, its columns' lengths. `Deferred` weights carry what
others are made of through control flow, so that they are made where they are used, a layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.dropout import drop
from lorax.lift.contract import Labels, arrange, contract

RANK = "rank"


class Unsupported(Exception):
    """Raised by a rule that cannot serve an equation; the interpreter turns it into an error with the path."""


class Value:
    """A structured weight inside the walk: an immutable pytree with the shape and dtype of the dense weight."""

    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} defines no shape")

    @property
    def dtype(self) -> Any:
        raise TypeError(f"{type(self).__name__} defines no dtype")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def before_scan(self) -> Value:
        """The value as it can be scanned over; raises Unsupported if it cannot."""
        return self

    def before_shards(self) -> Value:
        """The value in a form whose arrays can be split along the weight's axes."""
        return self

    def inside_scan(self) -> Value:
        """The value of one step of a scan, once each of its arrays has lost the scanned axis."""
        return self

    def specs(self, spec: PartitionSpec) -> Any:
        """The value with a partition spec in the place of each array, from the dense weight's spec."""
        raise Unsupported(f"a {type(self).__name__} cannot enter a shard_map")

    def dense(self) -> jax.Array:
        """The dense weight. Only `on_unsupported="materialize"` and a gathered row ask for it."""
        raise TypeError(f"{type(self).__name__} has no dense form")


def abstract(x: Any) -> Any:
    """What `make_jaxpr` needs to see of an argument: an array as it is, a structured value as its dense shape."""
    while isinstance(x, (Factored, Scaled, Deferred)):
        x = x.base
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Value) else x


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """A cast that leaves nothing in the trace where there is nothing to do."""
    return x if x.dtype == dtype else jax.lax.convert_element_type(x, dtype)


def densify(x: Any) -> Any:
    """The dense array of a value; anything else as it is."""
    return x.dense() if isinstance(x, Value) else x


@dataclass(frozen=True, eq=False)
class Factored(Value):
    """base + scale * a b, each broadcastable against the weight; `a` and `b` have the rank as an extra last axis.

    key, rate: while training with dropout, two words (an extra last axis as well) that draw the mask of the inputs.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    path: str
    key: Any = None
    rate: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def before_scan(self) -> Factored:
        base = self.base.before_scan() if isinstance(self.base, Value) else self.base
        return replace(self, base=base)

    def before_shards(self) -> Factored:
        base = self.base.before_shards() if isinstance(self.base, Value) else self.base
        return replace(self, base=base)

    def in_a(self, axis: int) -> bool:
        """Whether `a` depends on an axis. An axis of size one counts as a's, so that each axis has a home."""
        return self.a.shape[axis] == self.shape[axis]

    def in_b(self, axis: int) -> bool:
        return self.b.shape[axis] == self.shape[axis] and self.shape[axis] != 1

    def is_stacked(self, axis: int) -> bool:
        return self.in_a(axis) and self.in_b(axis)

    def factor(self, which: str, labels: Labels) -> tuple[jax.Array, Labels]:
        """One factor without its broadcast axes, in the weight's dtype, with the labels that are left."""
        x, holds = (self.a, self.in_a) if which == "a" else (self.b, self.in_b)
        gone = tuple(axis for axis in range(self.ndim) if not holds(axis))
        kept = tuple(label for axis, label in enumerate(labels) if axis not in gone)
        return cast(jax.lax.squeeze(x, gone) if gone else x, self.dtype), (*kept, RANK)

    def scaled(self, h: jax.Array, h_labels: Labels, labels: Labels) -> jax.Array:
        """scale * h, where the scale may differ along the stacked axes that h carries."""
        gone = tuple(axis for axis in range(self.ndim) if self.scale.shape[axis] == 1)
        kept = tuple(label for axis, label in enumerate(labels) if axis not in gone)
        scale = cast(jax.lax.squeeze(self.scale, gone), h.dtype)
        order = [label for label in h_labels if label in kept]
        if order != list(kept):
            scale = jax.lax.transpose(scale, [kept.index(label) for label in order])
        # lax, not operators: this runs for every adapted product, and operators trace through a jit of their own.
        return jax.lax.mul(h, jax.lax.broadcast_in_dim(scale, h.shape, [h_labels.index(label) for label in order]))

    def delta(self) -> jax.Array:
        """scale * a b as a dense array that broadcasts against the weight."""
        labels = tuple(range(self.ndim))
        a, a_labels = self.factor("a", labels)
        b, b_labels = self.factor("b", labels)
        a = self.scaled(a, a_labels, labels)
        out, out_labels = contract(a, a_labels, b, b_labels, frozenset(labels))
        return arrange(out, out_labels, labels)

    def dense(self) -> jax.Array:
        return densify(self.base) + self.delta()

    def specs(self, spec: PartitionSpec) -> Any:
        """Each factor is split along the mesh axes of the weight's axes that it has, the rank never."""
        base = self.base.specs(spec) if isinstance(self.base, Value) else spec
        return self.each(base, lambda x, extra: _along(spec, x, self.shape))

    def each(self, base: Any, function: Any) -> Factored:
        """A new value from a new base and one function for a, b, scale and key: `function(array, extra_axes)`."""
        a, b, scale = function(self.a, 1), function(self.b, 1), function(self.scale, 0)
        key = None if self.key is None else function(self.key, 1)
        return replace(self, base=base, a=a, b=b, scale=scale, key=key)

    def dropped(self, x: jax.Array) -> jax.Array:
        """What the low-rank path sees of an input."""
        return x if self.key is None else drop(x, self.key, self.rate)


@dataclass(frozen=True, eq=False)
class Scaled(Value):
    """base * by: a structured weight times an array that has size one along every axis it does not depend on."""

    base: Any
    by: jax.Array
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def before_scan(self) -> Scaled:
        return replace(self, base=self.base.before_scan())

    def before_shards(self) -> Scaled:
        return replace(self, base=self.base.before_shards())

    def inside_scan(self) -> Scaled:
        return replace(self, base=self.base.inside_scan())

    def specs(self, spec: PartitionSpec) -> Any:
        return replace(self, base=self.base.specs(spec), by=_along(spec, self.by, self.shape))

    def each(self, base: Any, function: Any) -> Scaled:
        """A new value from a new base and a function for the lengths: `function(array, extra_axes)`."""
        return replace(self, base=base, by=function(self.by, 0))

    def dense(self) -> jax.Array:
        return (densify(self.base).astype(jnp.float32) * self.by).astype(self.dtype)


class Deferred(Value):
    """A weight that is made of its parts where an operation touches it; control flow carries the parts.

    A subclass has `base` and arrays that broadcast against the weight, as those of `Factored` do.
    """

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def ready(self) -> Value:
        """The weight that rules serve."""
        raise TypeError(f"{type(self).__name__} is never ready")

    def before_scan(self) -> Any:
        return replace(self, base=self.base.before_scan()) if isinstance(self.base, Value) else self  # pyright: ignore

    def before_shards(self) -> Value:
        return self.ready().before_shards()

    def dense(self) -> jax.Array:
        return self.ready().dense()


def _along(spec: PartitionSpec, x: jax.Array, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of an array that broadcasts against a weight of this shape and spec."""
    pairs = zip(spec, x.shape, shape, strict=False)
    return PartitionSpec(*(name if size == full else None for name, size, full in pairs))


@dataclass(frozen=True, eq=False)
class Pieces(Value):
    """A weight cut along axis 0 into parts (arrays or values) that scan and slices can take one by one."""

    parts: tuple[Any, ...]
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def joints(self) -> list[int]:
        """The positions along axis 0 where one part ends and the next begins."""
        ends, total = [], 0
        for part in self.parts[:-1]:
            total += part.shape[0]
            ends.append(total)
        return ends

    def dense(self) -> jax.Array:
        return jnp.concatenate([densify(part) for part in self.parts], axis=0)


jax.tree_util.register_dataclass(Factored, data_fields=["base", "a", "b", "scale", "key"], meta_fields=["path", "rate"])
jax.tree_util.register_dataclass(Scaled, data_fields=["base", "by"], meta_fields=["path"])
jax.tree_util.register_dataclass(Pieces, data_fields=["parts"], meta_fields=["path"])
