"""LoftQ: factors that start by making up for part of the quantisation error, instead of at zero.

    minimise ||W - Q - s A B||_F:   Q = quantise(W - s A B),   s A B = best rank-r approximation of W - dequantise(Q)

in turns, from A B = 0. Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for LLMs", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapt import adapt
from lorax.errors import LoraxError
from lorax.quant.tree import quantize_weight
from lorax.quantized import Quantized
from lorax.spec import LoraSpec
from lorax.tree import map_named
from lorax.weights import Axes, LowRank


def loftq(
    params: Any,
    spec: LoraSpec,
    format: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    steps: int = 5,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> Any:
    """Quantise the targets of a spec and start their factors at the best correction of the error.

    Args:
        params: the plain tree, concrete, in 16 or 32 bits.
        spec: targets, ranks and scales; `init` does not matter, both factors are computed.
        format, double_quant, block_size: as in `quantize`.
        steps: turns; the paper uses 1 to 5.
        fn, args: as in `adapt`.

    Returns:
        The adapted tree, `LowRank(base=Quantized)` at the targets.

    Raises:
        LoraxError: as `adapt` and `quantize`, or fewer than one step.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}
        >>> lorax.loftq(params, lorax.LoraSpec(targets="kernel", rank=4))["kernel"]
        LowRank(shape=(64, 16), rank=4, base=float32)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise LoraxError(f"loftq: steps must be a whole number of at least 1, not {steps!r}")
    # The key does not matter: both factors are replaced.
    tree = adapt(jax.random.key(0), params, spec, fn, args)

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return _fit(path, leaf, format, double_quant, block_size, steps)

    return map_named(one, tree)


def _fit(path: str, leaf: LowRank, format: str, double_quant: bool, block_size: int, steps: int) -> LowRank:
    weight = leaf.base.astype(jnp.float32)
    change = jnp.zeros_like(weight)
    base: Any = None
    factors: tuple[jax.Array, jax.Array] | None = None
    for _ in range(steps):
        rest = (weight - change).astype(leaf.base.dtype)
        base = quantize_weight(path, rest, leaf.axes, format, double_quant, block_size)
        assert isinstance(base, Quantized)
        factors = best_factors(weight - base.dense().astype(jnp.float32), leaf.axes, leaf.rank, leaf.scale)
        fitted = replace(leaf, base=None, A=factors[0].astype(leaf.A.dtype), B=factors[1].astype(leaf.B.dtype))
        change = fitted.dense().astype(jnp.float32)
    assert factors is not None
    return replace(leaf, base=base, A=factors[0].astype(leaf.A.dtype), B=factors[1].astype(leaf.B.dtype))


def best_factors(error: jax.Array, axes: Axes, rank: int, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A `(*stack, *in, rank)` and B `(*stack, rank, *out)` with scale A B the best rank-r approximation of an error.

    The singular values are shared equally: A = U sqrt(S / scale), B = sqrt(S / scale) V.
    """
    s, i = len(axes.stack), len(axes.inputs)
    moved = jnp.transpose(error, axes.order)
    sizes = moved.shape
    matrix = moved.reshape(*sizes[:s], math.prod(sizes[s : s + i]), math.prod(sizes[s + i :]))
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    scale = jnp.reshape(scale, (*jnp.shape(scale), *[1] * (s + 1 - jnp.ndim(scale))))
    root = jnp.sqrt(values[..., :rank] / jnp.abs(scale))
    a = u[..., :rank] * root[..., None, :] * jnp.sign(scale)[..., None]
    b = root[..., :, None] * v[..., :rank, :]
    return a.reshape(*sizes[: s + i], rank), b.reshape(*sizes[:s], rank, *sizes[s + i :])
