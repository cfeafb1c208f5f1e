"""Choosing weights: patterns over the paths of a tree, with an error for a pattern that chooses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.paths import Pattern, matches, near_misses, show
from lorax.spec import ALL_LINEAR

# Words in a path that tell an output head. No trace can: a head is a matmul like any other.
HEADS = frozenset({"lm_head", "head", "classifier", "logits", "output_layer", "score"})

# Names of weights that no matmul consumes, for trees that come without a function to trace.
NOT_LINEAR = frozenset({"bias", "scale", "embedding", "embed", "gamma", "beta", "mean", "var", "norm", "b", "g"})


def choose(patterns: Sequence[Pattern], named: Sequence[tuple[str, Any]], what: str) -> list[str]:
    """The paths that any of the patterns fits, in tree order.

    Raises:
        LoraxError: a pattern that fits no path, with near misses.
    """
    for pattern in patterns:
        if not any(matches(pattern, path, leaf) for path, leaf in named):
            raise LoraxError(_no_match(pattern, [path for path, _ in named], what))
    return [path for path, leaf in named if any(matches(pattern, path, leaf) for pattern in patterns)]


def _no_match(pattern: Pattern, paths: Iterable[str], what: str) -> str:
    near = near_misses(pattern, paths)
    if not near:
        return f"{what}: {show(pattern)} matches no weight: the tree is empty"
    bare = isinstance(pattern, str) and not any(c in pattern for c in "*?[/") and any(pattern in p for p in near)
    hint = f" (a glob fits the whole path: write '*{pattern}*')" if bare else ""
    return f"{what}: {show(pattern)} matches no weight; near misses: {', '.join(near)}{hint}"


def is_floating_matrix(leaf: Any) -> bool:
    """Whether a leaf can hold a matrix at all."""
    return hasattr(leaf, "dtype") and len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_head(path: str) -> bool:
    """Whether the path names an output head."""
    return any(word.lower() in HEADS for word in path.split("/"))


def linear_by_name(named: Sequence[tuple[str, Any]]) -> list[str]:
    """`"all-linear"` for a tree without a function: matrices whose names say no norm, bias, embedding or head."""
    out = []
    for path, leaf in named:
        words = [word.lower() for word in path.split("/")]
        plain = words[-1] not in NOT_LINEAR and not any("embed" in word or "norm" in word for word in words)
        if is_floating_matrix(leaf) and plain and not is_head(path):
            out.append(path)
    return out


def is_all_linear(patterns: Sequence[Any]) -> bool:
    return any(isinstance(pattern, str) and pattern == ALL_LINEAR for pattern in patterns)
