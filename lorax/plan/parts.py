"""What of an adapted tree is base and what was learned, whatever kind of change it is."""

from __future__ import annotations

import math
from typing import Any

from lorax.bank import Bank
from lorax.plan.job import Trees
from lorax.tree import named_leaves
from lorax.variants.vera import Vera
from lorax.weights import Change

# Arrays of a change but its scale and its tables: of LowRank and FrozenA, of Dora, of Vera, of a Bank.
_ARRAYS = ("A", "B", "magnitude", "d", "b")


def base_of(leaf: Any) -> Any:
    """The weight under a change; another leaf itself."""
    return leaf.base if isinstance(leaf, (Change, Bank)) else leaf


def learned(given: Trees) -> list[Any]:
    """The arrays of all changes: those that train, and those that a variant draws once and keeps."""
    halves = (leaf for half in (given.trainable, given.frozen) for _, leaf in named_leaves(half))
    changes = [leaf for leaf in halves if isinstance(leaf, (Change, Bank))]
    found = (getattr(leaf, name, None) for leaf in changes for name in _ARRAYS)
    return [x for x in found if x is not None]


def rank_of(leaf: Any) -> int:
    """The rank that a token meets: of a bank the bound, which every row of a mixed batch is padded to."""
    return leaf.max_rank if isinstance(leaf, Bank) else leaf.rank


def layers_of(leaf: Any) -> int:
    """How many layers' changes a leaf holds."""
    return math.prod(leaf.shape[axis] for axis in leaf.axes.stack)


def low_rank(params: Any) -> int:
    """Sum of r (in + out) over the adapted matrices of all layers: numbers that meet a token."""
    total = 0
    for _, leaf in named_leaves(params):
        if isinstance(leaf, (Change, Bank)):
            wide = sum(math.prod(leaf.shape[axis] for axis in axes) for axes in (leaf.axes.inputs, leaf.axes.outputs))
            total += layers_of(leaf) * rank_of(leaf) * wide
    return total


def trains_factors(params: Any) -> bool:
    """Whether factors have gradients of their own: VeRA trains vectors beside them instead."""
    return not any(isinstance(leaf, Vera) for _, leaf in named_leaves(params))
