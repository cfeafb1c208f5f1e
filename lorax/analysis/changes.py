"""How much each weight changed, and in how many directions.

    relative size     ||dW||_F / ||W||_F,   s_1(dW) / s_1(W)
    effective rank    the smallest k with s_1^2 + ... + s_k^2 >= 90% of the sum of all
    amplification     ||dW||_F / ||U^T W V||_F with U, V the singular vectors of dW: how much larger the change is in
                      its own directions than the weight was there (those directions that hold 99.9% of it)

dW = s A B is never built: its singular values are those of a small core, R_A R_B^T, of the factors' QR decompositions.
Source: Hu et al. 2021, "LoRA", section 7.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import lorax.linalg as linalg
from lorax.analysis.matrices import Pair, pairs
from lorax.analysis.result import Analysis, kind_of
from lorax.analysis.similarity import similarity
from lorax.tree import merge, named_leaves
from lorax.weights import Change as Learned

# The share of the squared singular values that the effective rank holds.
SHARE = 0.9

# The change's directions in which the weight is measured: those that hold this share, at most so many. What is left of
# a change that was merged and taken apart again is rounding, which has directions of its own.
AMPLIFIED, DIRECTIONS = 0.999, 64

# Of the power method.
TURNS = 100

# Below this share of a weight's norm a change is rounding.
NOTHING = 1e-12


@dataclass(frozen=True)
class Change:
    """What happened to one matrix.

    path, layer: the weight, and which of its stacked matrices (None where there is one).
    frobenius, spectral: norms of the change.
    relative_frobenius, relative_spectral: over those of the weight before.
    values: singular values of the change, falling.
    effective_rank: see above; 0 where nothing changed.
    amplification: see above; None where nothing changed.
    """

    path: str
    layer: int | None
    frobenius: float
    spectral: float
    relative_frobenius: float
    relative_spectral: float
    values: tuple[float, ...]
    effective_rank: int
    amplification: float | None

    @property
    def changed(self) -> bool:
        return self.frobenius > 0

    @property
    def kind(self) -> str:
        """The weight's kind: its path without what all weights share."""
        return kind_of(self.path)


def analyze(before: Any, after: Any) -> Analysis:
    """What happened to the weights between two trees, or of two adapters of one base.

    Args:
        before: the plain tree before, or an adapted one.
        after: the adapted tree, or a plain one of the same paths. If both are adapted, each is compared with the base,
            and with the other.

    Returns:
        Every matrix's change (`rows`), those of the first adapter (`first`) and their similarity where there are two.

    Raises:
        LoraxError: the trees are not of one model.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> from lorax.analysis import analyze
        >>> base = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "v": jnp.ones((4, 4))}
        >>> found = analyze(base, {**base, "w": base["w"] + jnp.outer(jnp.arange(8.0), jnp.ones(6))})
        >>> [(row.path, row.effective_rank) for row in found.rows if row.changed], found.unchanged
        ([('w', 1)], ('v',))

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 7.
    """
    if _adapted(before) and _adapted(after):
        first, rows = _rows(list(pairs(None, before))), _rows(list(pairs(None, after)))
        return Analysis(tuple(rows), tuple(first), similarity(before, after))
    if _adapted(before):
        # An adapted tree before a plain one: what was taken back again.
        before = merge(before)
    return Analysis(tuple(_rows(list(pairs(before, after)))))


def _adapted(tree: Any) -> bool:
    return any(isinstance(leaf, Learned) for _, leaf in named_leaves(tree))


def _rows(found: list[Pair]) -> list[Change]:
    return [row for pair in found for row in _of(pair)]


def _of(pair: Pair) -> list[Change]:
    stacked = bool(pair.axes.stack)
    if not pair.learned():
        zeros = (0.0, 0.0, 0.0, 0.0, (), 0, None)
        return [Change(pair.path, i if stacked else None, *zeros) for i in range(pair.count())]
    before, svd = pair.before(), pair.svd()
    norms, tops = (np.asarray(x, np.float64) for x in _sizes(before))
    values = np.asarray(svd.values, np.float64)
    count = min(values.shape[-1], DIRECTIONS)
    cores = np.asarray(_inside(before, svd.u[..., :count], svd.v[..., :count, :]), np.float64)
    return [
        _row(pair.path, i if stacked else None, values[i], float(norms[i]), float(tops[i]), cores[i])
        for i in range(len(values))
    ]


def _row(path: str, layer: int | None, values: np.ndarray, norm: float, top: float, core: np.ndarray) -> Change:
    size = float(np.linalg.norm(values))
    if size <= NOTHING * max(norm, 1e-30):
        return Change(path, layer, 0.0, 0.0, 0.0, 0.0, tuple(np.zeros_like(values)), 0, None)
    spectral = float(values[0])
    relative = (size / norm if norm else float("inf"), spectral / top if top else float("inf"))
    k = min(effective_rank(values, AMPLIFIED), len(core))
    inside = float(np.linalg.norm(core[:k, :k]))
    amplified = size / inside if inside else float("inf")
    return Change(path, layer, size, spectral, *relative, tuple(values.tolist()), effective_rank(values), amplified)


def effective_rank(values: np.ndarray, share: float = SHARE) -> int:
    """The smallest k whose first k squared singular values hold `share` of the sum of all.

    Example:
        >>> effective_rank(np.array([3.0, 1.0, 0.5, 0.1]))
        2
    """
    energy = np.cumsum(np.asarray(values, np.float64) ** 2)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1) if energy.size and energy[-1] else 0


@jax.jit
def _sizes(before: Float[Array, "n in out"]) -> tuple[jax.Array, jax.Array]:
    """||W||_F and s_1(W), by the power method on the smaller of W W^T and W^T W.

    A value that is nearly s_1 hides s_1 by no more than their distance, so it needs no subspace; and a loop of one
    small product compiles in a moment, where decompositions take seconds for each shape.
    """
    wide = before.shape[1] <= before.shape[2]

    def one(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        gram = jnp.matmul(w, w.T, precision=linalg.HIGHEST) if wide else jnp.matmul(w.T, w, precision=linalg.HIGHEST)

        def turn(_: Any, v: jax.Array) -> jax.Array:
            v = jnp.matmul(gram, v, precision=linalg.HIGHEST)
            return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

        # No direction is orthogonal to these numbers but by a miracle.
        v = jax.lax.fori_loop(0, TURNS, turn, jnp.cos(jnp.arange(gram.shape[0], dtype=gram.dtype)))
        top = jnp.vdot(v, jnp.matmul(gram, v, precision=linalg.HIGHEST))
        return jnp.sqrt(jnp.trace(gram)), jnp.sqrt(jnp.maximum(top, 0))

    # One matrix at a time, which stays in the cache while the loop turns.
    return jax.lax.map(one, before)


@jax.jit
def _inside(before: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """U^T W V."""
    return jnp.einsum("nir,nio,nso->nrs", u, before, v, precision=linalg.HIGHEST)
