"""What a start of the factors may look at, and the plain starts: A random, B zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax.linalg import Svd

# A (*stack, in, r) and B (*stack, r, out)
Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Matrix:
    """A weight as the stack of matrices that it is, and the change that it is to get.

    key: its own random key.
    stack, ins, outs: the sizes.
    rank, scale, dtype: of the change.
    weight: gives the values `(*stack, in, out)` in float32; asked only by starts that need them.
    inputs: sum of x x^T over example inputs, `(*stack, in, in)`, for a start from data.
    """

    key: jax.Array
    stack: tuple[int, ...]
    ins: int
    outs: int
    rank: int
    scale: float
    dtype: Any
    weight: Callable[[], Float[Array, "*stack in out"]]
    inputs: Float[Array, "*stack in in"] | None = None

    def zero_b(self) -> jax.Array:
        return jnp.zeros((*self.stack, self.rank, self.outs), self.dtype)


def gaussian(m: Matrix) -> Pair:
    """A ~ N(0, 1/in), B = 0."""
    a = jax.random.normal(m.key, (*m.stack, m.ins, m.rank), jnp.float32) * (1.0 / math.sqrt(m.ins))
    return a.astype(m.dtype), m.zero_b()


def uniform(m: Matrix) -> Pair:
    """A ~ U(-1, 1) / sqrt(in), B = 0."""
    width = 1.0 / math.sqrt(m.ins)
    return jax.random.uniform(m.key, (*m.stack, m.ins, m.rank), m.dtype, -width, width), m.zero_b()


def shared_out(found: Svd, scale: float) -> Pair:
    """Factors with scale A B = U S V, the singular values shared equally: A = U sqrt(S / s), B = sqrt(S / s) V."""
    root = jnp.sqrt(found.values / abs(scale))
    sign = math.copysign(1.0, scale)
    return found.u * root[..., None, :] * sign, root[..., :, None] * found.v
