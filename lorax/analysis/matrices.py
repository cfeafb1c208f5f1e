"""Two trees as pairs of matrices: the weight before, and its change, as factors where that is what it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import lorax.linalg as linalg
from lorax.errors import LoraxError
from lorax.rebase import factors_of
from lorax.tree import named_leaves
from lorax.weights import Axes, Concat, as_matrices, dense, is_structured
from lorax.weights import Change as Learned


@dataclass(frozen=True)
class Pair:
    """One weight before and after, as a stack of matrices.

    path: in the tree.
    before: gives the values before, `(matrices, in, out)` float32.
    factors: A `(matrices, in, r)` with the scale in it and B `(matrices, r, out)`; None where the change is dense.
    after: gives the values after, for a dense change.
    same: nothing changed: both trees hold the very same array.
    """

    path: str
    before: Any
    factors: tuple[jax.Array, jax.Array] | None
    after: Any
    axes: Axes
    same: bool = False

    def count(self) -> int:
        """How many matrices it stacks."""
        return jax.eval_shape(self.before).shape[0]

    def learned(self) -> bool:
        """Whether there is a change at all; factors count as one even where B is zero."""
        return not self.same and (self.factors is not None or bool(jnp.any(self.change())))

    def change(self) -> Float[Array, "matrices in out"]:
        """The change as dense matrices."""
        if self.factors is None:
            return self.after() - self.before()
        return jnp.matmul(*self.factors, precision=linalg.HIGHEST)

    def svd(self) -> linalg.Svd:
        """The SVD of the change: of the factors' core where there are factors, else of each dense matrix in turn."""
        if self.factors is not None:
            return linalg.product(*self.factors)
        found = [linalg.top(matrix, min(matrix.shape)) for matrix in self.change()]
        return linalg.Svd(*(jnp.stack(part) for part in zip(*found, strict=True)))


def pairs(before: Any, after: Any) -> Iterator[Pair]:
    """The matrices of two trees that belong together, in tree order; weights that are no matrices are left out.

    Args:
        before: a plain tree, or an adapted one whose base then counts; None for the base of `after`.
        after: an adapted tree, or a plain one of the same paths.

    Raises:
        LoraxError: a path or a shape that only one of them has; an adapter without a base.
    """
    old = None if before is None else dict(named_leaves(before))
    new = dict(named_leaves(after))
    if old is not None and set(old) != set(new):
        odd = sorted(set(old) ^ set(new))[0]
        raise LoraxError(f"{odd}: is in one of the two trees alone; compare two of one model")
    for path, leaf in new.items():
        base = _base(leaf) if old is None else _base(old[path])
        if base is None:
            raise LoraxError(f"{path}: an adapter without its base; attach it first")
        if tuple(base.shape) != tuple(leaf.shape):
            raise LoraxError(f"{path}: has shape {tuple(base.shape)} in one tree and {tuple(leaf.shape)} in the other")
        if len(leaf.shape) >= 2 and not _is_vectors(path, leaf):
            yield _pair(path, base, leaf, old is None or isinstance(leaf, Learned))


def _base(leaf: Any) -> Any:
    return leaf.base if isinstance(leaf, Learned) else leaf


def _is_vectors(path: str, leaf: Any) -> bool:
    """Whether a weight of two axes is a stack of vectors: a norm or a bias of every layer."""
    word = path.rsplit("/", 1)[-1]
    return len(leaf.shape) == 2 and word in ("scale", "bias")


def _pair(path: str, base: Any, leaf: Any, own: bool) -> Pair:
    axes = leaf.axes if isinstance(leaf, Learned) else Axes.default(len(leaf.shape))
    plain = leaf.low_rank() if isinstance(leaf, Learned) else None
    # Over another base than its own, a change is what it and the base's difference come to.
    same = plain is not None and own and (plain.base is base or _equal(plain.base, base))
    factors = None
    if same and plain is not None:
        a, b = factors_of(plain)
        factors = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    before, after = (functools.partial(_flat, x, axes) for x in (base, leaf))
    return Pair(path, before, factors, after, axes, same=leaf is base)


def _equal(one: Any, other: Any) -> bool:
    if is_structured(one) or is_structured(other) or isinstance(one, Concat):
        return False
    return np.array_equal(np.asarray(one), np.asarray(other))


def _flat(leaf: Any, axes: Axes) -> jax.Array:
    matrices = as_matrices(jnp.asarray(dense(leaf)), axes).astype(jnp.float32)
    return matrices.reshape(-1, *matrices.shape[-2:])
