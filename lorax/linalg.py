"""Decompositions of (stacks of) matrices: truncated from either end, exact or by random sketches, and of a product.

All work in float32 at least, over any number of leading axes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST

# Columns of a sketch beyond those wanted: the error of the last wanted one falls with them.
MORE = 10


class Svd(NamedTuple):
    """U (*, n, k), values (*, k) falling, V (*, k, m): U diag(values) V."""

    u: Float[Array, "*stack n k"]
    values: Float[Array, "*stack k"]
    v: Float[Array, "*stack k m"]


@functools.partial(jax.jit, static_argnums=(1,))
def top(w: Float[Array, "*stack n m"], k: int) -> Svd:
    """The k largest singular triples, exactly."""
    u, values, v = jnp.linalg.svd(w, full_matrices=False)
    return Svd(u[..., :k], values[..., :k], v[..., :k, :])


@functools.partial(jax.jit, static_argnums=(1,))
def bottom(w: Float[Array, "*stack n m"], k: int) -> Svd:
    """The k smallest singular triples, exactly."""
    u, values, v = jnp.linalg.svd(w, full_matrices=False)
    return Svd(u[..., -k:], values[..., -k:], v[..., -k:, :])


@functools.partial(jax.jit, static_argnums=(2, 3))
def top_fast(key: jax.Array, w: Float[Array, "*stack n m"], k: int, steps: int = 4) -> Svd:
    """The k largest singular triples by subspace iteration on a random sketch.

    Q <- orth(W W^T Q) in `steps` turns from W times a Gaussian matrix, then the exact SVD of the small Q^T W. The error
    falls as (s_{k + MORE} / s_k)^(2 steps + 1).

    Source: Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithms 4.4 and 5.1.
    """
    width = min(k + MORE, *w.shape[-2:])
    q = _orth(_times(w, jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width), w.dtype)))
    q = jax.lax.fori_loop(0, steps, lambda _, q: _orth(_times(w, _orth(_times(_t(w), q)))), q)
    u, values, v = jnp.linalg.svd(_times(_t(q), w), full_matrices=False)
    return Svd(_times(q, u[..., :k]), values[..., :k], v[..., :k, :])


@functools.partial(jax.jit, static_argnums=(2, 3))
def bottom_fast(key: jax.Array, w: Float[Array, "*stack n m"], k: int, steps: int = 4) -> Svd:
    """The k smallest singular triples by subspace iteration with the inverse: `top_fast` of W^-1, never built.

    W = Q R (of W^T where W is wide); a turn solves with R and R^T. Of a matrix without full rank it finds a basis of
    what W takes to (almost) nothing.
    """
    if w.shape[-2] < w.shape[-1]:
        turned = bottom_fast(key, _t(w), k, steps)
        return Svd(_t(turned.v), turned.values, _t(turned.u))
    q, r = jnp.linalg.qr(w)
    # A diagonal that is zero to rounding would divide by nothing; lifted to rounding it is still the smallest.
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    least = jnp.finfo(w.dtype).eps * jnp.max(jnp.abs(diagonal), axis=-1, keepdims=True)
    lift = jnp.where(jnp.abs(diagonal) < least, least - diagonal, jnp.zeros((), w.dtype))
    safe = r + lift[..., None] * jnp.eye(r.shape[-1], dtype=w.dtype)
    width = min(k + MORE, r.shape[-1])
    basis = _orth(jax.random.normal(key, (*w.shape[:-2], r.shape[-1], width), w.dtype))
    turn = lambda _, x: _orth(_solve(safe, _solve(safe, x, transpose=True)))  # noqa: E731
    basis = jax.lax.fori_loop(0, steps + 1, turn, basis)
    u, values, v = jnp.linalg.svd(_times(r, basis), full_matrices=False)
    return Svd(_times(q, u[..., -k:]), values[..., -k:], _times(v, _t(basis))[..., -k:, :])


@jax.jit
def product(a: Float[Array, "*stack n r"], b: Float[Array, "*stack r m"]) -> Svd:
    """The SVD of A B from the factors: QR of A and of B^T, then the SVD of an r x r core. A B is not built.

    Ranks above n or m give min(n, r, m) triples.
    """
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(_t(b))
    u, values, v = jnp.linalg.svd(_times(ra, _t(rb)), full_matrices=False)
    return Svd(_times(qa, u), values, _times(v, _t(qb)))


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)


def _orth(x: jax.Array) -> jax.Array:
    return jnp.linalg.qr(x)[0]


def _solve(r: jax.Array, x: jax.Array, transpose: bool = False) -> jax.Array:
    return jax.lax.linalg.triangular_solve(r, x, left_side=True, lower=False, transpose_a=transpose)
