"""`Bank`: many low-rank changes of one weight as a leaf, and `Selected`: the one that an example is for.

    W_i = base + scale_i * sum of A[p] B[p] over the rows p that adapter i owns

The adapters of a bank lie one after the other along one axis, the total rank, so that storage is the sum of their ranks
whatever their mix. Where each lies is data, not shape: putting one in or taking one out recompiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Int, UInt8

from lorax.errors import LoraxError
from lorax.weights import Axes, Structured, register
from lorax_kernels.placement import Placement

# Longest name of an adapter, in bytes of UTF-8.
NAME_BYTES = 64


@register
@dataclass(frozen=True, eq=False)
class Bank(Structured):
    """The low-rank changes of many adapters to one weight.

    base: the frozen weight; None in a bank off its base.
    A: `(*stack, total, *in)`, trains. Rows `start[i] .. start[i] + rank[i]` are adapter i's, transposed.
    B: `(*stack, total, *out)`, trains. The same rows.
    scale: float32 `(*stack, slots)`.
    start, rank: int32 `(slots,)`; rank 0 where adapter i does not change this weight.
    names: the adapters' names as bytes of UTF-8, a row each, zeros in a free slot. As data: a name in the tree's
        structure would be part of every compiled program's key.
    axes: the role of each axis of the base.
    max_rank: a bound on the ranks, static.
    placement: how a bank on a mesh lies, noted by `lorax.sharding.shard`: its `core` has the mesh axes of A's features
        and of B's. None on one device.

    `lorax.stack` makes it; `lorax.select` says which adapter an example is for.
    """

    base: Any
    A: Float[Array, "*stack_total_in"]
    B: Float[Array, "*stack_total_out"]
    scale: Float[Array, "*stack slots"]
    start: Int[Array, "slots"]
    rank: Int[Array, "slots"]
    names: UInt8[Array, "slots bytes"]
    axes: Axes
    max_rank: int
    placement: Placement | None = None

    TRAINS: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    META: ClassVar[frozenset[str]] = frozenset({"axes", "max_rank", "placement"})

    @property
    def slots(self) -> int:
        """How many adapters there is room for."""
        return self.rank.shape[0]

    @property
    def total(self) -> int:
        """How much rank there is room for."""
        return self.A.shape[len(self.axes.stack)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, which the factors alone determine."""
        s = len(self.axes.stack)
        sizes = (*self.A.shape[:s], *self.A.shape[s + 1 :], *self.B.shape[s + 1 :])
        out = [0] * len(sizes)
        for axis, size in zip(self.axes.order, sizes, strict=True):
            out[axis] = size
        return tuple(out)

    @property
    def dtype(self) -> Any:
        return self.A.dtype if self.base is None else self.base.dtype

    def dense(self) -> jax.Array:
        raise LoraxError(
            f"a bank of {self.slots} adapters over a weight {self.shape} is no one weight; take one adapter out with "
            "lorax.unstack, or choose one for each example with lorax.select"
        )

    def __repr__(self) -> str:
        base = "no base" if self.base is None else f"base={self.base.dtype}"
        return f"Bank(shape={self.shape}, slots={self.slots}, total_rank={self.total}, {base})"


@register
@dataclass(frozen=True, eq=False)
class Selected(Structured):
    """A bank, and which of its adapters act: W = base + sum_j weights_j (W_{ids_j} - base).

    ids: int32 `(*lead, several)`; -1 acts as the base alone. `lead` is () for one example, or the leading axes of the
        activations where each row has its own.
    weights: float32 of the same shape.
    """

    bank: Bank
    ids: Int[Array, "*lead several"]
    weights: Float[Array, "*lead several"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bank.shape

    @property
    def dtype(self) -> Any:
        return self.bank.dtype

    def dense(self) -> jax.Array:
        return self.bank.dense()

    def __repr__(self) -> str:
        return f"Selected({self.bank!r}, ids{tuple(self.ids.shape)})"
