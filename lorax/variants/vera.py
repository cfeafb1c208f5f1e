"""VeRA: one pair of random matrices for all layers, and two trained vectors for each.

    W = W0 + s A diag(d) B diag(b)        A, B random and frozen, the same for every weight; d and b train

A is (in, r) and B (r, out); weights of other sizes take the first rows and columns that they need, A's scaled to the
variance 1 / in. d starts at 0.1 and
b at zero, so W starts at W0. s is 1 whatever alpha is: the two vectors are the scale. Source: Kopiczko et al. 2023,
"VeRA: Vector-based Random Matrix Adaptation".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax.weights import Axes, Change, LowRank, base_name, register

D_START = 0.1


@register
@dataclass(frozen=True, eq=False)
class Vera(Change):
    """A weight with a change by two vectors over shared random factors: W = base + A diag(d) B diag(b).

    base: the frozen weight, any shape; None in an adapter taken off its base.
    A: `(*in, rank)`, shared by all layers, frozen.
    B: `(rank, *out)`, shared by all layers, frozen.
    d: `(*stack, rank)`, trains.
    b: `(*stack, *out)`, trains.
    axes, dropout: as in `LowRank`.
    """

    base: Any
    A: Float[Array, "*in r"]
    B: Float[Array, "r *out"]
    d: Float[Array, "*stack r"]
    b: Float[Array, "*stack_out"]
    axes: Axes
    dropout: float = 0.0

    KIND: ClassVar[str] = "vera"
    TRAINS: ClassVar[frozenset[str]] = frozenset({"d", "b"})
    META: ClassVar[frozenset[str]] = frozenset({"axes", "dropout"})

    @property
    def rank(self) -> int:
        return self.A.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (*self.d.shape[:-1], *self.A.shape[:-1], *self.B.shape[1:])
        return tuple(size for _, size in sorted(zip(self.axes.order, sizes, strict=True)))

    @property
    def dtype(self) -> Any:
        return self.A.dtype if self.base is None else self.base.dtype

    def low_rank(self) -> LowRank:
        """W = base + A' B' with A' = A diag(d), B' = B diag(b): factors of their own for every layer."""
        s, i, o = (len(group) for group in (self.axes.stack, self.axes.inputs, self.axes.outputs))
        d = jnp.expand_dims(self.d, tuple(range(s, s + i)))
        b = jnp.expand_dims(self.b, s)
        assert b.ndim == s + 1 + o
        return LowRank(self.base, self.A * d, self.B * b, jnp.ones((), jnp.float32), self.axes, self.dropout)

    def dense(self) -> jax.Array:
        return self.low_rank().dense()

    def __repr__(self) -> str:
        return f"Vera(shape={self.shape}, rank={self.rank}, base={base_name(self.base)})"


def build(leaf: LowRank, key: jax.Array, dtype: Any) -> Vera:
    """VeRA at the place of a low-rank leaf, of its shape and rank.

    Args:
        leaf: says base, shape, rank and axes; its factors are not used.
        key: the key of the whole adaptation: all weights draw the same A and B from it.
        dtype: of everything but the base.
    """
    s, i = len(leaf.axes.stack), len(leaf.axes.inputs)
    stack, ins, outs = leaf.A.shape[:s], leaf.A.shape[s : s + i], leaf.B.shape[s + 1 :]

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        for_a, for_b = jax.random.split(key)
        # Variance 1 / in, whatever the rank: x A then has the size of x.
        a = shared(for_a, math.prod(ins), leaf.rank) * math.sqrt(leaf.rank / math.prod(ins))
        a = a.astype(dtype).reshape(*ins, leaf.rank)
        b = shared(for_b, math.prod(outs), leaf.rank).astype(dtype).T.reshape(leaf.rank, *outs)
        return a, b, jnp.full((*stack, leaf.rank), D_START, dtype), jnp.zeros((*stack, *outs), dtype)

    abstract = isinstance(leaf.A, jax.ShapeDtypeStruct)
    values = jax.eval_shape(draw, key) if abstract else draw(key)
    return Vera(leaf.base, *values, leaf.axes, leaf.dropout)


def shared(key: jax.Array, size: int, rank: int) -> Float[Array, "size r"]:
    """The first `size` rows of an endless random matrix of `rank` columns: uniform, variance 1 / rank.

    Row k depends on the key, k and the rank alone, so that weights of different sizes share rows.
    """
    rows = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key, k), (rank,), jnp.float32, -1.0, 1.0))
    return rows(jnp.arange(size)) * math.sqrt(3.0 / rank)
