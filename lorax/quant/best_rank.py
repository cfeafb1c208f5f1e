"""The best approximation of given rank of a matrix, without all of its singular values.

    Y random,  then in turns  Y = E (E^T Y), made orthonormal,  Q = orth(Y),  E ~ Q (Q^T E) cut to rank r

A full decomposition of a 4096 x 4096 weight takes a processor half a minute; this takes products with a few columns.
An error of quantisation has a flat spectrum, which asks for more turns than is usual: with eight, and a rank's
worth of columns to spare, what is found holds over 99% of what the best holds.

Source: Halko, Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from lorax.weights import Axes

TURNS = 8
_SPARE = 16
# Matrices with a side this small are decomposed as a whole.
_SMALL = 64


def best_factors(
    error: Float32[Array, "*shape"], axes: Axes, rank: int, scale: Float32[Array, "*stack"]
) -> tuple[Float32[Array, "*stack_in r"], Float32[Array, "*stack_r_out"]]:
    """A `(*stack, *in, rank)` and B `(*stack, rank, *out)` with scale A B the best rank-r approximation of an error.

    The singular values are shared equally: A = U sqrt(S / scale), B = sqrt(S / scale) V. The same numbers for the same
    error: the random start is fixed.
    """
    s, i = len(axes.stack), len(axes.inputs)
    moved = jnp.transpose(error, axes.order)
    sizes = moved.shape
    matrix = moved.reshape(*sizes[:s], math.prod(sizes[s : s + i]), math.prod(sizes[s + i :]))
    u, values, v = top_singular(matrix, rank)
    scale = jnp.reshape(scale, (*jnp.shape(scale), *[1] * (s + 1 - jnp.ndim(scale))))
    root = jnp.sqrt(values / jnp.abs(scale))
    a = u * root[..., None, :] * jnp.sign(scale)[..., None]
    b = root[..., :, None] * v
    return a.reshape(*sizes[: s + i], rank), b.reshape(*sizes[:s], rank, *sizes[s + i :])


def top_singular(
    matrix: Float32[Array, "*stack m n"], rank: int
) -> tuple[Float32[Array, "*stack m r"], Float32[Array, "*stack r"], Float32[Array, "*stack r n"]]:
    """The first `rank` singular vectors and values, U S V."""
    *_, m, n = matrix.shape
    if m > n:
        u, values, v = top_singular(jnp.swapaxes(matrix, -1, -2), rank)
        return jnp.swapaxes(v, -1, -2), values, jnp.swapaxes(u, -1, -2)
    columns = 2 * rank + _SPARE
    if m <= max(_SMALL, columns):
        u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], values[..., :rank], v[..., :rank, :]
    # To a norm of one: the turns below take high powers of it.
    size = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    matrix = matrix / jnp.where(size > 0, size, 1)
    turned = jnp.swapaxes(matrix, -1, -2)
    # E E^T once is less work than E and E^T in each turn, where the matrix has few rows.
    square = matrix @ turned if m <= 2 * TURNS * columns else None

    def turn(_: int, y: Array) -> Array:
        y = _orthonormal(y)
        return matrix @ (turned @ y) if square is None else square @ y

    start = jax.random.normal(jax.random.key(0), (m, columns), matrix.dtype)
    y = jax.lax.fori_loop(0, TURNS, turn, jnp.broadcast_to(start, (*matrix.shape[:-1], columns)))
    q = _orthonormal(y)
    # Q^T E has few rows: what is left is a problem of that size.
    rows = jnp.swapaxes(q, -1, -2) @ matrix
    squares, u = jnp.linalg.eigh(rows @ jnp.swapaxes(rows, -1, -2))
    u, values = u[..., ::-1][..., :rank], jnp.sqrt(jnp.maximum(squares[..., ::-1][..., :rank], 0))
    v = jnp.swapaxes(u, -1, -2) @ rows
    return q @ u, values * size[..., 0], v / jnp.where(values > 0, values, 1)[..., None]


def _orthonormal(y: Float32[Array, "*stack m c"]) -> Float32[Array, "*stack m c"]:
    """Orthonormal columns of the same span, by the eigenvectors of Y^T Y.

    The first time directions far below the largest one are only lifted, which the rounding of Y^T Y allows; the second
    time they are near enough. A QR decomposition would work on all of Y: where other processes want the same cores,
    the threads of LAPACK spend ten times as long waiting for each other.
    """
    for _ in range(2):
        values, vectors = jnp.linalg.eigh(jnp.swapaxes(y, -1, -2) @ y)
        lengths = jax.lax.rsqrt(values + 1e-6 * values[..., -1:] + 1e-30)
        y = (y @ vectors) * lengths[..., None, :]
    return y
