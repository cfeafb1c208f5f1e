"""Rotary position embedding: queries and keys turned by an angle that grows with the position.

Feature i and feature i + head_dim / 2 form a pair, turned by `position * f_i` with `f_i = theta^(-2i /
head_dim)`, so that a product of query and key depends on the distance between them alone.

Source: Su et al. 2021, "RoFormer"; the scaling is that of Llama 3.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorax.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32; one head axis to broadcast over."""

    cos: Float[Array, "b t 1 half"]
    sin: Float[Array, "b t 1 half"]


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per token of each pair of features, float32, shape (head_dim / 2,)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = (config.rope_theta**-exponent).astype(np.float32)
    return plain if config.rope_scaling is None else _scaled(plain, config.rope_scaling)


def _scaled(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slow pairs are divided by the factor, fast ones kept, those between blended by their wavelength."""
    turns = scaling.original_max_length * plain / (2 * math.pi)  # turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (plain * keep + plain / scaling.factor * (1.0 - keep)).astype(np.float32)


def rotation(config: ModelConfig, positions: Int[Array, "b t"]) -> Rotation:
    """The angles of these positions, computed once and used by every layer."""
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies(config))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t h d"], turn: Rotation) -> Float[Array, "b t h d"]:
    """Turn every pair of features; the arithmetic is float32, the result has x's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> quarter = Rotation(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
        >>> rotate(jnp.array([3.0, 5.0]).reshape(1, 1, 1, 2), quarter).tolist()
        [[[[-5.0, 3.0]]]]
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * turn.cos - high * turn.sin, high * turn.cos + low * turn.sin], axis=-1)
    return turned.astype(x.dtype)
