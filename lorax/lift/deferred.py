"""Weights that are made where they are used: DoRA's, whose norm needs base and factors, and VeRA's shared factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.contract import arrange, contract
from lorax.lift.values import RANK, Deferred, Factored, Scaled, densify
from lorax.variants.dora import LEAST
from lorax.weights import wider


@dataclass(frozen=True, eq=False)
class Normed(Deferred):
    """magnitude * V / ||V||: `base` is V, `magnitude` has size one along the inputs, over which the norm runs."""

    base: Any
    magnitude: jax.Array
    path: str

    def ready(self) -> Scaled:
        norm = jax.lax.stop_gradient(column_norms(self.base, self.magnitude.shape))
        return Scaled(self.base, self.magnitude / norm.astype(self.magnitude.dtype), self.path)


def column_norms(weight: Factored, kept: tuple[int, ...]) -> jax.Array:
    """||W0 + s A B|| over the axes where `kept` has size one, from the factors: the sum is not built.

    ||W0||^2 + 2 s sum_r B (A^T W0) + s^2 sum_r B (A^T A B), in float32 at least.
    """
    labels = tuple(range(weight.ndim))
    outer = frozenset(axis for axis in labels if kept[axis] == weight.shape[axis] and kept[axis] != 1)
    inner = tuple(axis for axis in labels if axis not in outer)
    highest = jax.lax.Precision.HIGHEST
    wide = wider(weight.dtype, jnp.float32)
    base = densify(weight.base).astype(wide)
    a, a_labels = _factor(weight, "a", labels, wide)
    b, b_labels = _factor(weight, "b", labels, wide)
    across, across_labels = contract(base, labels, a, a_labels, outer | {RANK}, highest)
    gram, gram_labels = contract(a, a_labels, a, _renamed(a_labels), outer | {RANK, "other"}, highest)
    product, product_labels = contract(b, _renamed(b_labels), gram, gram_labels, outer | {RANK}, highest)

    def summed(x: jax.Array, x_labels: Any) -> jax.Array:
        return jnp.sum(arrange(b, b_labels, (*labels, RANK)) * arrange(x, x_labels, (*labels, RANK)), axis=-1)

    scale = weight.scale.astype(wide)
    square = jnp.sum(base * base, axis=inner, keepdims=True)
    square += 2 * scale * summed(across, across_labels) + scale * scale * summed(product, product_labels)
    # Where the change takes a column to nothing, rounding may leave less than nothing of the square.
    return jnp.maximum(jnp.sqrt(jnp.maximum(square, jnp.zeros((), wide))), jnp.asarray(LEAST, wide))


def _factor(weight: Factored, which: str, labels: Any, dtype: Any) -> Any:
    """A factor in full width without its broadcast axes, and its labels."""
    x, holds = (weight.a, weight.in_a) if which == "a" else (weight.b, weight.in_b)
    gone = tuple(axis for axis in labels if not holds(axis))
    kept = tuple(axis for axis in labels if axis not in gone)
    return jax.lax.squeeze(x, gone).astype(dtype), (*kept, RANK)


def _renamed(labels: Any) -> Any:
    return tuple("other" if label == RANK else label for label in labels)


@dataclass(frozen=True, eq=False)
class Shared(Deferred):
    """base + a diag(d) b diag(m), a and b the same in every layer: `d` has the rank last, `m` has size one there."""

    base: Any
    a: jax.Array
    b: jax.Array
    d: jax.Array
    m: jax.Array
    path: str
    key: Any = None
    rate: float = 0.0

    def ready(self) -> Factored:
        ones = jnp.ones((1,) * self.ndim, jnp.float32)
        return Factored(self.base, self.a, self.b * self.d * self.m, ones, self.path, self.key, self.rate)


jax.tree_util.register_dataclass(Normed, data_fields=["base", "magnitude"], meta_fields=["path"])
jax.tree_util.register_dataclass(Shared, data_fields=["base", "a", "b", "d", "m", "key"], meta_fields=["path", "rate"])
