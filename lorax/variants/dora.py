"""DoRA: the direction of each column changes by low rank, its length on its own.

    V = W0 + s A B
    W = m * V / ||V||           one length m and one norm for each output; the norm is detached:

    dL/dV = m / ||V|| * dL/dW,      dL/dm = sum_in dL/dW * V / ||V||

so that the gradient does not flow through ||V|| (the paper's section 4.3). m starts at ||W0||, so W starts at W0.

Nothing of W's size is built for it. The norm comes from the factors,

    ||V||^2 = ||W0||^2 + 2 s sum_r B * (A^T W0) + s^2 sum_r B * (A^T A B),

and m / ||V|| scales what x V gives. Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax.weights import (
    Axes,
    Change,
    LowRank,
    as_matrices,
    base_name,
    dense,
    inverse_order,
    low_rank_delta,
    register,
    wider,
)

# Shorter columns have no direction: they are divided by this.
LEAST = 1e-30


@register
@dataclass(frozen=True, eq=False)
class Dora(Change):
    """A weight as length times direction: W = m V / ||V|| with V = W0 + s A B.

    weight: V as a `LowRank`; its factors train.
    magnitude: m, `(*stack, *out)`, trains.
    """

    weight: Any
    magnitude: Float[Array, "*stack_out"]

    KIND: ClassVar[str] = "dora"
    TRAINS: ClassVar[frozenset[str]] = frozenset({"magnitude"})

    @property
    def base(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weight.base

    @property
    def axes(self) -> Axes:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weight.axes

    @property
    def A(self) -> jax.Array:
        return self.weight.A

    @property
    def B(self) -> jax.Array:
        return self.weight.B

    @property
    def scale(self) -> jax.Array:
        return self.weight.scale

    @property
    def rank(self) -> int:
        return self.weight.rank

    @property
    def dropout(self) -> float:
        return self.weight.dropout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def with_base(self, base: Any) -> Dora:
        return replace(self, weight=self.weight.with_base(base))

    def dense(self) -> jax.Array:
        weight = self.weight
        v = _direction(weight)
        lengths = jnp.maximum(column_norms(v, weight.axes), jnp.asarray(LEAST, v.dtype))
        return (v * spread(self.magnitude.astype(v.dtype) / lengths, weight.axes)).astype(weight.base.dtype)

    def __repr__(self) -> str:
        return f"Dora(shape={self.shape}, rank={self.rank}, base={base_name(self.base)})"


def _direction(weight: LowRank) -> jax.Array:
    """V, in float32 at least."""
    wide = wider(weight.base.dtype, jnp.float32)
    return dense(weight.base).astype(wide) + low_rank_delta(weight).astype(wide)


def build(leaf: LowRank) -> Dora:
    """The leaf with the lengths of the columns of W0 + s A B, as they start, beside it."""

    def lengths(leaf: LowRank) -> jax.Array:
        return column_norms(_direction(leaf), leaf.axes).astype(leaf.B.dtype)

    abstract = isinstance(jax.tree.leaves(leaf.base)[0], jax.ShapeDtypeStruct)
    return Dora(leaf, jax.eval_shape(lengths, leaf) if abstract else lengths(leaf))


def column_norms(weight: jax.Array, axes: Axes) -> Float[Array, "*stack_out"]:
    """||W|| over the inputs, for each output: `(*stack, *out)`.

    Example:
        >>> column_norms(jnp.array([[3.0, 0.0], [4.0, 2.0]]), Axes.default(2))
        Array([5., 2.], dtype=float32)
    """
    stack, outs = (tuple(weight.shape[a] for a in group) for group in (axes.stack, axes.outputs))
    return jnp.linalg.norm(as_matrices(weight, axes), axis=-2).reshape(*stack, *outs)


def spread(values: jax.Array, axes: Axes) -> jax.Array:
    """`(*stack, *out)` values as an array that broadcasts against the weight."""
    s, i = len(axes.stack), len(axes.inputs)
    return jnp.transpose(jnp.expand_dims(values, tuple(range(s, s + i))), inverse_order(axes.order))
