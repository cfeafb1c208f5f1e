"""The structured leaves of an adapted tree, and the equation that each keeps.

    LowRank   W = base + scale * sum_r A[..., r] B[r, ...]
    Full      W = value, and it trains
    Concat    W = concatenation of the parts along axis 0

LowRank is one kind of `Change`, a frozen base and what was learned on top; `variants/` has the others. A leaf stands
where the user's array stood and has its `shape` and `dtype`. Which of its arrays train is a fact of the class
(`TRAINS`), so `mask`, `split` and `optimizer` need nothing but the tree. All are pytrees: `jit`, `vmap`, Optax and
Orbax see the arrays inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax.errors import LoraxError


@dataclass(frozen=True)
class Axes:
    """The role of each axis of a weight, as a partition of `range(ndim)`.

    stack: axes that hold independent weights (scanned layers, experts); both factors have them, in front.
    inputs: axes that a matmul contracts; they belong to A.
    outputs: axes that it leaves; they belong to B.

    Example:
        >>> Axes(stack=(0,), inputs=(1,), outputs=(2,)).order
        (0, 1, 2)
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The weight's axes in the order stack, inputs, outputs."""
        return (*self.stack, *self.inputs, *self.outputs)

    @staticmethod
    def default(ndim: int) -> Axes:
        """The last two axes are the matrix, all before them are stacked."""
        return Axes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))


class Structured:
    """Base of the structured leaves: an immutable pytree that knows which of its fields train."""

    TRAINS: ClassVar[frozenset[str]] = frozenset()
    # Fields that are facts about the leaf, not arrays.
    META: ClassVar[frozenset[str]] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} defines no shape")

    @property
    def dtype(self) -> Any:
        raise TypeError(f"{type(self).__name__} defines no dtype")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        """The plain array that the leaf stands for, in its own dtype."""
        raise TypeError(f"{type(self).__name__} has no dense form")


def register(cls: Any) -> Any:
    """Make a structured leaf a pytree: its META fields are static, the others hold arrays."""
    names = [f.name for f in fields(cls)]
    data, meta = [n for n in names if n not in cls.META], [n for n in names if n in cls.META]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


class Change(Structured):
    """A leaf that is a frozen base and what was learned on top of it.

    A kind of change has `base` (None in an adapter taken off its base), `axes`, `rank` and `dropout`, as fields or
    properties, and the two methods here.
    """

    KIND: ClassVar[str] = "change"
    base: Any
    axes: Axes

    @property
    def rank(self) -> int:
        raise TypeError(f"{type(self).__name__} defines no rank")

    def with_base(self, base: Any) -> Any:
        """The same change over another base."""
        return replace(self, base=base)  # pyright: ignore[reportArgumentType]

    def low_rank(self) -> LowRank | None:
        """The plain low-rank change that it equals, over the same base; None where there is none."""
        return None


@register
@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """A weight with a low-rank change beside it: W = base + scale * A B.

    base: the frozen weight, any shape; None in an adapter taken off its base (`extract`).
    A: `(*stack, *in, rank)`, trains.
    B: `(*stack, rank, *out)`, trains.
    scale: float32, shape () or (*stack,): alpha / rank, or alpha / sqrt(rank) for rsLoRA. It does not train.
    axes: the role of each axis of the base.
    dropout: the probability with which an input of the low-rank path is dropped while `lorax.dropout` asks for it.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    base: Any
    A: Float[Array, "*stack_in r"]
    B: Float[Array, "*stack_r_out"]
    scale: Float[Array, "*stack"]
    axes: Axes
    dropout: float = 0.0

    KIND: ClassVar[str] = "low-rank"
    TRAINS: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    META: ClassVar[frozenset[str]] = frozenset({"axes", "dropout"})

    @property
    def rank(self) -> int:
        return self.A.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, which the factors alone determine."""
        s, i = len(self.axes.stack), len(self.axes.inputs)
        sizes = (*self.A.shape[: s + i], *self.B.shape[s + 1 :])
        out = [0] * len(sizes)
        for axis, size in zip(self.axes.order, sizes, strict=True):
            out[axis] = size
        return tuple(out)

    @property
    def dtype(self) -> Any:
        return self.A.dtype if self.base is None else self.base.dtype

    def dense(self) -> jax.Array:
        delta = low_rank_delta(self)
        if self.base is None:
            return delta
        base = dense(self.base)
        wide = wider(base.dtype, delta.dtype)
        return (base.astype(wide) + delta.astype(wide)).astype(base.dtype)

    def low_rank(self) -> LowRank:
        return LowRank(self.base, self.A, self.B, self.scale, self.axes, self.dropout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, rank={self.rank}, base={base_name(self.base)})"


@register
@dataclass(frozen=True, eq=False)
class Full(Structured):
    """A plain weight that trains as it is: W = value. `train_also` and full fine-tuning make these."""

    value: Any

    TRAINS: ClassVar[frozenset[str]] = frozenset({"value"})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def dense(self) -> jax.Array:
        return dense(self.value)

    def __repr__(self) -> str:
        return f"Full(shape={self.shape})"


@register
@dataclass(frozen=True, eq=False)
class Concat(Structured):
    """A stacked weight in pieces: W = concatenate(parts, axis=0), each part an array or another leaf.

    The pieces may differ in what trains: frozen lower layers and a trained top is `Concat((frozen, Full(top)))`.
    `lift` cuts a scan over such a weight at the joints, so the layers below the first trained one drop out of the
    backward pass.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.shape[0] for part in self.parts)

    def dense(self) -> jax.Array:
        return jnp.concatenate([dense(part) for part in self.parts], axis=0)

    def __repr__(self) -> str:
        return f"Concat({', '.join(map(repr_part, self.parts))})"


def base_name(base: Any) -> str:
    """The base of a change in a word: its dtype."""
    return "no base" if base is None else jnp.dtype(base.dtype).name


def repr_part(part: Any) -> str:
    """A part of a Concat in one word or its own repr."""
    return repr(part) if isinstance(part, Structured) else f"array{tuple(part.shape)}"


def is_structured(leaf: Any) -> bool:
    """Whether a leaf is one of the structured weights. Serves as `is_leaf` for tree functions."""
    return isinstance(leaf, Structured)


def check_rank(path: str, rank: int, shape: tuple[int, ...], axes: Axes) -> None:
    """Refuse a rank under 1 or above min(in, out), naming the weight.

    Raises:
        LoraxError: with the path, the rank and the limit.
    """
    limit = min(math.prod(shape[a] for a in axes.inputs), math.prod(shape[a] for a in axes.outputs))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise LoraxError(f"{path}: rank must be a whole number of at least 1, not {rank!r}")
    if rank > limit:
        raise LoraxError(
            f"{path}: rank {rank} is above min(in, out) = {limit} of its shape {shape}; choose at most {limit}"
        )


def low_rank_delta(weight: LowRank) -> Float[Array, "*shape"]:
    """scale * A B as a dense array of the weight's shape, in float32 or the factors' dtype if that is wider.

    This builds what `lift` never builds; it is for `merge` and for tests.
    """
    s, i = len(weight.axes.stack), len(weight.axes.inputs)
    stack, ins = weight.A.shape[:s], weight.A.shape[s : s + i]
    outs = weight.B.shape[s + 1 :]
    a = weight.A.reshape(*stack, math.prod(ins), weight.rank)
    b = weight.B.reshape(*stack, weight.rank, math.prod(outs))
    # The highest precision, and no sum in 16 bits: a merged weight is written once and read for ever.
    wide = wider(weight.A.dtype, jnp.float32)
    ab = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    scale = weight.scale.astype(ab.dtype)
    ab = ab * scale.reshape(*scale.shape, *([1] * (ab.ndim - scale.ndim)))
    ab = ab.reshape(*stack, *ins, *outs)
    return jnp.transpose(ab, inverse_order(weight.axes.order))


def as_matrices(weight: jax.Array, axes: Axes) -> Float[Array, "*stack in out"]:
    """A weight as matrices: stacked axes in front, the others merged into one input and one output axis."""
    s, i = len(axes.stack), len(axes.inputs)
    moved = jnp.transpose(weight, axes.order)
    ins, outs = moved.shape[s : s + i], moved.shape[s + i :]
    return moved.reshape(*moved.shape[:s], math.prod(ins), math.prod(outs))


def wider(one: Any, other: Any) -> Any:
    """The dtype that holds both; said outright, since a strict session promotes nothing by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(order.index(axis) for axis in range(len(order)))


def dense(leaf: Any) -> Any:
    """The plain array that a leaf stands for, in its own dtype. Plain arrays come back as they are."""
    return leaf.dense() if isinstance(leaf, Structured) else leaf


def children(leaf: Structured) -> list[tuple[str, Any]]:
    """The data fields of a structured leaf by name, in order (what trains is asked by name)."""
    return [(f.name, getattr(leaf, f.name)) for f in fields(leaf) if f.name not in leaf.META]  # pyright: ignore[reportArgumentType]


def with_children(leaf: Any, values: dict[str, Any]) -> Any:
    """The same kind of leaf with other data fields."""
    return replace(leaf, **values)
