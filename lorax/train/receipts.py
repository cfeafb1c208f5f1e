"""Proof that training reached every weight that it was asked to reach.

A pattern can match a weight that the loss never uses, and a learning rate can be too small for a dtype; both
train "successfully" and change nothing. So each trained leaf keeps the largest |gradient| it ever saw, and
each B is looked at after the last step: B starts at zero, so max |B| = 0 means that the adapter is still the
identity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.train.checkpoint import path_name
from lorax.train.step import State


class Receipt(NamedTuple):
    """What happened to one trained array.

    Attributes:
        target: its path, for instance `layers/attn/q_proj/kernel/B`.
        largest: max |value| after training. For a B, which starts at zero, this is how far it moved.
        gradient: largest |gradient| ever seen.
        layers: how many layers of a stacked array received a gradient, and how many there are; (1, 1) if not
            stacked.
        moved: whether training reached all of it.
    """

    target: str
    largest: float
    gradient: float
    layers: tuple[int, int]
    moved: bool

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "layers": list(self.layers)}


def coverage(state: State) -> list[Receipt]:
    """One receipt for each trained array except A, whose gradient is zero until its B has moved.

    Args:
        state: the state after at least one step.
    """
    seen = dict(_named(state.receipts))
    out = []
    for name, value in _named(state.trainable):
        if name.endswith("/A"):
            continue
        gradients = np.atleast_1d(np.asarray(seen[name]))
        largest = float(np.max(np.abs(np.asarray(value, np.float32)))) if value.size else 0.0
        reached = int((gradients > 0).sum())
        moved = reached == gradients.size and (largest > 0 or not name.endswith("/B"))
        out.append(Receipt(name, largest, float(gradients.max()), (reached, gradients.size), moved))
    return out


def unmoved(receipts: list[Receipt]) -> str | None:
    """The sentence that names what training did not reach; None when it reached everything."""
    still = [r for r in receipts if not r.moved]
    if not still:
        return None
    first = still[0]
    reached, layers = first.layers
    where = f" in {layers - reached} of {layers} layers" if 0 < reached < layers else ""
    more = f" (and {len(still) - 1} more targets)" if len(still) > 1 else ""
    return (
        f"{first.target}: never moved{where}{more}: the loss does not depend on it or "
        "the learning rate is too small; leave it out of the targets"
    )


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
