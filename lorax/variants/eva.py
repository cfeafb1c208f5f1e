"""EVA: A starts as the directions in which a layer's inputs vary most, and ranks go where they explain most.

    X = U S V^T (inputs of one weight, tokens x in);      A = V_r,   B = 0
    share of component j of weight i:   xi_ij = s_ij^2 / sum_k s_ik^2

All components of all weights are sorted by their share; the best sum of ranks of them are kept, at most rho r for one
weight. A weight may get none: it keeps a single component, so that it has a place. Only S and V are needed, so what is
collected of the inputs is X^T X. Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via
Explained Variance Adaptation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax.linalg as linalg
from lorax.variants.start import Matrix, Pair

# The largest rank of a weight over the one that was asked for.
RHO = 2.0


def eva(m: Matrix) -> Pair:
    """The `rank` leading directions of the inputs, orthonormal."""
    assert m.inputs is not None
    found = linalg.top_fast(m.key, m.inputs, m.rank, steps=8)
    return found.u.astype(m.dtype), m.zero_b()


def shares(key: jax.Array, inputs: jax.Array, count: int) -> np.ndarray:
    """The explained shares of the `count` leading components of each matrix, `(*stack, count)`, falling."""
    found = linalg.top_fast(key, inputs, count, steps=8)
    whole = jnp.trace(inputs, axis1=-2, axis2=-1)[..., None]
    return np.asarray(found.values / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny), np.float64)


def redistribute(shares: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The rank of each matrix: the components of the largest shares, as many in all as the ranks asked for come to.

    Args:
        shares: path -> `(*stack, most)`, the explained shares of each matrix's components, falling.
        ranks: path -> the rank that was asked for.

    Returns:
        path -> ranks, `(*stack)`, each from 1 to `most`.

    Example:
        >>> redistribute({"a": np.array([0.9, 0.05]), "b": np.array([0.3, 0.2])}, {"a": 1, "b": 1})
        {'a': array(1), 'b': array(1)}
    """
    flat = {path: np.asarray(value).reshape(-1, value.shape[-1]) for path, value in shares.items()}
    budget = sum(ranks[path] * len(value) for path, value in flat.items())
    # The first component of each matrix is its place; the others compete.
    rest = [(-value[i, j], path, i, j) for path, value in flat.items() for i, j in np.ndindex(value.shape) if j]
    kept = sorted(rest)[: max(0, budget - sum(map(len, flat.values())))]
    counts = {path: np.ones(len(value), np.int64) for path, value in flat.items()}
    for _, path, i, _ in kept:
        counts[path][i] += 1
    return {path: counts[path].reshape(np.asarray(value).shape[:-1]) for path, value in shares.items()}
