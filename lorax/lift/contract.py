"""Products of two arrays whose axes carry labels: a `dot_general` with the bookkeeping done once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax

Labels = tuple[Hashable, ...]


def contract(
    lhs: jax.Array,
    lhs_labels: Sequence[Hashable],
    rhs: jax.Array,
    rhs_labels: Sequence[Hashable],
    keep: frozenset[Hashable],
    precision: Any = None,
    dtype: Any = None,
) -> tuple[jax.Array, Labels]:
    """Multiply two labelled arrays: shared labels in `keep` are batched, shared labels outside it are summed.

    Returns the product and its labels in `dot_general`'s own order (batch, rest of lhs, rest of rhs), so that no
    transpose is made here. Labels that only one side has must be in `keep`.
    """
    lhs_labels, rhs_labels = tuple(lhs_labels), tuple(rhs_labels)
    shared = [label for label in lhs_labels if label in rhs_labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]

    def positions(labels: Labels, wanted: Sequence[Hashable]) -> tuple[int, ...]:
        return tuple(labels.index(label) for label in wanted)

    numbers = (
        (positions(lhs_labels, summed), positions(rhs_labels, summed)),
        (positions(lhs_labels, batch), positions(rhs_labels, batch)),
    )
    out = jax.lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=dtype)
    rest = [label for label in lhs_labels if label not in shared]
    rest += [label for label in rhs_labels if label not in shared]
    return out, (*batch, *rest)


def arrange(x: jax.Array, labels: Sequence[Hashable], out: Sequence[Hashable]) -> jax.Array:
    """Transpose a labelled array to the order `out`; labels it lacks become axes of size one."""
    labels = tuple(labels)
    present = [label for label in out if label in labels]
    order = tuple(labels.index(label) for label in present)
    if order != tuple(range(len(order))):
        x = jax.lax.transpose(x, order)
    missing = tuple(i for i, label in enumerate(out) if label not in labels)
    return jax.lax.expand_dims(x, missing) if missing else x
