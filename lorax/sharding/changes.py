"""Specs of what was learned on top of a weight: every factor lies as the axes of the weight that it has.

W (in: i, out: o)        LowRank  A (in: i, rank: -)          B (rank: -, out: o)
                         Dora     the same, and m (out: o)
                         Vera     A (in: i, rank: -), B (rank: -, out: o), d (rank: -), b (out: o)
                         Bank     A (total rank: a, in: i)    B (total rank: a, out: o)

The rank is whole: a product over parts of it would be a sum on the wire for every token. Of a bank it is
split, over the mesh axis that plays the role `adapter`: its rows are different adapters', and a row of the batch
fetches those that it needs (`lift/fetched.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax.sharding import PartitionSpec

from lorax.bank import Bank
from lorax.variants.dora import Dora
from lorax.variants.vera import Vera
from lorax.weights import Axes, LowRank

Names = list[str | None]
# (shape, name of each axis) -> the spec, an axis that does not divide being whole.
Divide = Callable[[tuple[int, ...], Names], PartitionSpec]


def change_specs(leaf: Any, names: Names, divide: Divide, base: Any, adapter: str | None) -> Any:
    """The leaf with specs in the place of its arrays (None stays None).

    Args:
        leaf: a `Change` or a `Bank`.
        names: a mesh axis or None for each axis of the weight.
        divide: makes the spec of an array.
        base: the specs of the leaf's base.
        adapter: the mesh axis that splits a bank.

    Raises:
        TypeError: a kind of change that has no rule here.
    """
    stack, ins, outs = _by_role(leaf.axes, names)

    def one(array: Any, spread: Names) -> Any:
        return None if array is None else divide(tuple(array.shape), spread)

    if isinstance(leaf, LowRank):
        scale = None if leaf.scale is None else PartitionSpec(*(stack if leaf.scale.ndim else ()))
        a, b = one(leaf.A, [*stack, *ins, None]), one(leaf.B, [*stack, None, *outs])
        return replace(leaf, base=base, A=a, B=b, scale=scale)
    if isinstance(leaf, Dora):
        inner = change_specs(leaf.weight, names, divide, base, adapter)
        return replace(leaf, weight=inner, magnitude=one(leaf.magnitude, [*stack, *outs]))
    if isinstance(leaf, Vera):
        shared = {"A": one(leaf.A, [*ins, None]), "B": one(leaf.B, [None, *outs])}
        return replace(leaf, base=base, **shared, d=one(leaf.d, [*stack, None]), b=one(leaf.b, [*stack, *outs]))
    if isinstance(leaf, Bank):
        factors = {
            name: _factor(getattr(leaf, name), stack, features, divide, adapter)
            for name, features in (("A", ins), ("B", outs))
        }
        tables = {name: one(getattr(leaf, name), [None] * _ndim(getattr(leaf, name))) for name in _TABLES}
        return replace(leaf, base=base, **factors, **tables)
    raise TypeError(f"no rule for a {type(leaf).__name__}")


def bank_features(leaf: Bank, spec: Bank) -> tuple[str | None, str | None]:
    """The mesh axes of the features of A and B as one axis each: that of the first, where no other is split."""
    front = len(leaf.axes.stack) + 1

    def joined(names: Any) -> str | None:
        rest = (*names, *[None] * (front + 1))[front:]
        return rest[0] if not any(rest[1:]) else None

    return joined(tuple(spec.A or ())), joined(tuple(spec.B or ()))


def _factor(array: Any, stack: Names, features: Names, divide: Divide, adapter: str | None) -> Any:
    """Rows over the adapters' axis, features over the others; where the rows do not divide, features over all."""
    if array is None:
        return None
    shape, front = tuple(array.shape), len(stack)
    spread = divide(shape, [*stack, adapter, *(None if name == adapter else name for name in features)])
    if adapter is None or spread[front] is not None:
        return spread
    return divide(shape, [*stack, None, *features])


# What every device has of a bank: who is who.
_TABLES = ("scale", "start", "rank", "names")


def _ndim(array: Any) -> int:
    return 0 if array is None else len(array.shape)


def _by_role(axes: Axes, names: Names) -> tuple[Names, Names, Names]:
    stack, ins, outs = ([names[axis] for axis in group] for group in (axes.stack, axes.inputs, axes.outputs))
    return stack, ins, outs
