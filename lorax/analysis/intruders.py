"""Intruder dimensions: large directions of a fine-tuned weight that the weight before does not have.

    W' = W + dW = U' S' V'^T    (outputs x inputs)
    u'_j (j <= top) intrudes if |cos(u'_j, u_i)| < threshold for every left singular vector u_i of W
    mitigation: W' + (lambda - 1) sum over intruders of s'_j u'_j v'_j^T

In many dimensions a random direction is far from all of the u_i as well, so their share of the energy, sum of their
s'_j^2 over ||W'||_F^2, is told beside their number. Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An
Illusion of Equivalence".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax.linalg as linalg
from lorax.analysis.matrices import Pair, pairs
from lorax.errors import LoraxError
from lorax.tree import map_named, merge
from lorax.weights import inverse_order

TOP, THRESHOLD = 10, 0.5


@dataclass(frozen=True)
class Intruders:
    """The new directions of one matrix.

    cosines: for each of the `top` largest left singular vectors after, its largest |cos| with one of before.
    ranks: which of them intrude, from 0.
    energy: their share of the squared singular values after.
    """

    path: str
    layer: int | None
    cosines: tuple[float, ...]
    ranks: tuple[int, ...]
    energy: float


def intruders(before: Any, after: Any, top: int = TOP, threshold: float = THRESHOLD) -> tuple[Intruders, ...]:
    """The intruder dimensions of every matrix that changed. One full SVD for each: minutes for a large model.

    Args:
        before: the plain tree; None for the base of an adapted `after`.
        after: an adapted tree, or a plain one.
        top: how many of the largest directions are looked at.
        threshold: the |cos| below which a direction is new.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> w = jnp.diag(jnp.arange(8.0, 0.0, -1.0))
        >>> new = jnp.ones(8) / 8 ** 0.5
        >>> found = intruders({"w": w}, {"w": w + 50 * jnp.outer(new, new)}, top=3)[0]
        >>> found.ranks, round(found.energy, 2)
        ((0,), 0.94)
    """
    return tuple(found for found, _ in _search(before, after, top, threshold))


def mitigate(before: Any, after: Any, factor: float, top: int = TOP, threshold: float = THRESHOLD) -> Any:
    """The plain fine-tuned tree with every intruder dimension scaled by `factor` (lambda): 1 changes nothing, 0 takes
    them out.

    Args:
        before, after, top, threshold: as in `intruders`.
        factor: lambda, at least 0.

    Raises:
        LoraxError: a negative factor.

    Example:
        >>> import jax.numpy as jnp
        >>> w, new = jnp.diag(jnp.arange(8.0, 0.0, -1.0)), jnp.ones(8) / 8 ** 0.5
        >>> tuned = {"w": w + 50 * jnp.outer(new, new)}
        >>> intruders({"w": w}, mitigate({"w": w}, tuned, 0.1), top=1)[0].ranks
        ()
    """
    if not factor >= 0:
        raise LoraxError(f"mitigate: factor must be at least 0, not {factor!r}")
    less: dict[str, jax.Array] = {}
    for found, (pair, change) in _search(before, after, top, threshold):
        if found.ranks:
            rows = less.setdefault(pair.path, jnp.zeros_like(pair.before()))
            less[pair.path] = rows.at[found.layer or 0].add((factor - 1) * change)

    axes = {pair.path: pair.axes for pair in pairs(before, after)}

    def one(path: str, leaf: Any) -> Any:
        if path not in less:
            return leaf
        roles = axes[path]
        moved = less[path].reshape([leaf.shape[axis] for axis in roles.order])
        change = jnp.transpose(moved, inverse_order(roles.order))
        return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)

    return map_named(one, merge(after))


def _search(before: Any, after: Any, top: int, threshold: float) -> list[tuple[Intruders, tuple[Pair, Any]]]:
    out = []
    for pair in pairs(before, after):
        if not pair.learned():
            continue
        old, change = pair.before(), pair.change()
        for i in range(len(old)):
            if not bool(jnp.any(change[i])):
                continue
            found, part = _one(old[i], old[i] + change[i], top, threshold)
            ranks = tuple(np.flatnonzero(np.asarray(found[0]) < threshold).tolist())
            layer = i if pair.axes.stack else None
            energy = float(np.sum(np.asarray(found[1])[list(ranks)]))
            row = Intruders(pair.path, layer, tuple(np.asarray(found[0]).tolist()), ranks, energy)
            out.append((row, (pair, part)))
    return out


def _one(old: jax.Array, new: jax.Array, top: int, threshold: float) -> tuple[tuple[Any, Any], jax.Array]:
    """The cosines and shares of the largest directions after, and the part of the weight that intrudes.

    Weights here are (in, out): their right singular vectors are the left ones of (out, in).
    """
    directions = linalg.top(old, min(old.shape)).v
    found = linalg.top(new, min(top, *new.shape))
    cosines = jnp.max(jnp.abs(jnp.matmul(found.v, directions.T, precision=linalg.HIGHEST)), axis=1)
    shares = found.values**2 / jnp.sum(new * new)
    kept = jnp.where(cosines < threshold, found.values, 0.0)
    return (cosines, shares), (found.u * kept) @ found.v
