"""Whether two adapters look at the same directions of their inputs.

    phi(A, B, i, j) = ||U_A[:, :i]^T U_B[:, :j]||_F^2 / min(i, j)        from 0, orthogonal, to 1, contained

U_A and U_B the singular vectors of the two A factors on the side of the inputs (the right ones where A is r x in; a
dense change counts with its own). phi = 1 - d^2 / p for d the projection metric of p = min(i, j) dimensions. Source: Hu
et al. 2021, "LoRA", section 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorax.analysis.matrices import Pair, pairs

# Directions of a dense change that are compared, at most.
MOST = 64


@dataclass(frozen=True)
class Similarity:
    """phi of one matrix in two adapters: `grid[i - 1, j - 1]` is phi(A, B, i, j)."""

    path: str
    layer: int | None
    grid: np.ndarray

    @property
    def whole(self) -> float:
        """phi of all directions of both."""
        return float(self.grid[-1, -1])


def phi(u: Float[Array, "d i"], v: Float[Array, "d j"]) -> Float[Array, "i j"]:
    """phi(A, B, i, j) for all i and j, from orthonormal columns in order.

    Example:
        >>> import jax.numpy as jnp
        >>> phi(jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]).tolist()
        [[0.0, 0.0], [1.0, 0.5]]
    """
    squares = jnp.matmul(u.T, v, precision=jax.lax.Precision.HIGHEST) ** 2
    sums = jnp.cumsum(jnp.cumsum(squares, axis=0), axis=1)
    least = jnp.minimum(jnp.arange(1, u.shape[1] + 1)[:, None], jnp.arange(1, v.shape[1] + 1)[None, :])
    return sums / least.astype(sums.dtype)


def similarity(one: Any, two: Any) -> tuple[Similarity, ...]:
    """phi of every matrix that both of two adapted trees change.

    Args:
        one, two: adapted trees of one base.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((8, 6))}
        >>> tree = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=2))
        >>> round(similarity(tree, tree)[0].whole, 4)
        1.0
    """
    first = {pair.path: pair for pair in pairs(None, one)}
    out = []
    for pair in pairs(None, two):
        other = first.get(pair.path)
        if other is None or not (other.learned() and pair.learned()):
            continue
        grids = np.asarray(jax.vmap(phi)(_directions(other), _directions(pair)))
        out += [Similarity(pair.path, i if pair.axes.stack else None, grid) for i, grid in enumerate(grids)]
    return tuple(out)


def _directions(pair: Pair) -> Float[Array, "matrices in r"]:
    if pair.factors is None:
        return pair.svd().u[..., :MOST]
    return jnp.linalg.svd(pair.factors[0], full_matrices=False)[0]
