"""LoftQ: factors that start by making up for part of the quantisation error, instead of at zero.

    minimise ||W - Q - s A B||_F:   Q = quantise(W - s A B),   s A B = best rank-r approximation of W - dequantise(Q)

in turns, from A B = 0. With one turn Q is quantise(W), what everyone has who quantises the same weights; further turns
move Q, and the factors then belong to a base of their own. Either way they are worth nothing over W itself: merging
into W leaves out what they started at.

Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for LLMs", algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapt import adapt
from lorax.errors import LoraxError
from lorax.quant.best_rank import best_factors
from lorax.quant.tree import quantize_like, quantize_weight
from lorax.quantized import Quantized
from lorax.spec import LoraSpec
from lorax.tree import map_named, named_leaves
from lorax.weights import Axes, LowRank, low_rank_delta
from lorax_kernels.nf4.codebooks import FOUR_BIT

# (path, which of its stacked weights; None for a weight that is not stacked) -> those, as they were.
Original = Callable[[str, "slice | None"], jax.Array]


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
        steps: turns; the paper uses 1 to 5. With 1 the base is what `quantize` gives.
        fn, args: as in `adapt`.

    Returns:
        The adapted tree, `LowRank(base=Quantized)` at the targets. Save what was trained from it with
        `save_adapter(path, params, loftq=steps)`, so that it is loaded over no other base.

    Raises:
        LoraxError: as `adapt` and `quantize`, or fewer than one step.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}
        >>> lorax.loftq(params, lorax.LoraSpec(targets="kernel", rank=4))["kernel"]
        LowRank(shape=(64, 16), rank=4, base=float32)
    """
    # The key does not matter: both factors are replaced.
    tree = adapt(jax.random.key(0), params, spec, fn, args)
    plain = dict(named_leaves(params))

    def packed(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LowRank):
            return leaf
        return quantize_weight(path, leaf, leaf.axes, format, double_quant, block_size)

    def original(path: str, at: slice | None) -> jax.Array:
        return jnp.asarray(plain[path] if at is None else plain[path][at])

    return fit_factors(map_named(packed, tree), original, steps)


def fit_factors(params: Any, original: Original, turns: int = 1) -> Any:
    """The tree with every low-rank change over a 4-bit base started at the best correction of its error.

    One stacked weight after the other is asked for, so a base that was packed while it was read is never dense.

    Args:
        params: an adapted tree, as `adapt` gives over quantised weights; its factors are replaced.
        original: the weights before they were quantised, `(path, slice of the first axis, or None)` -> array.
        turns: of LoftQ; with 1 the base stays what it is.

    Raises:
        LoraxError: fewer than one turn; a base that is not in 4 bits.
    """
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise LoraxError(f"loftq: steps must be a whole number of at least 1, not {turns!r}")

    def one(path: str, leaf: Any) -> Any:
        if not (isinstance(leaf, LowRank) and isinstance(leaf.base, Quantized)):
            return leaf
        if leaf.base.array.format not in FOUR_BIT:
            raise LoraxError(f"{path}: LoftQ makes up for 4 bits, and this base is in {leaf.base.array.format}")
        return _fit(path, leaf, original, turns)

    return map_named(one, params)


def merge_trained(params: Any, original: Original) -> Any:
    """The original weights plus what training changed: W + s (A B - A0 B0), where A0 B0 is what LoftQ started at.

    However many turns LoftQ took, the last one fitted the factors to W - Q of the base that they were left with, so
    A0 B0 is found again from the two.

    Args:
        params: a trained tree over the base that its factors were fitted to.
        original: as for `fit_factors`.

    Returns:
        A plain tree in the original's dtype; quantised weights without factors are the original ones as well.
    """

    def one(path: str, leaf: Any) -> Any:
        base = leaf.base if isinstance(leaf, LowRank) else leaf
        if not isinstance(base, Quantized):
            return leaf.dense() if isinstance(leaf, LowRank) else leaf
        places = _places(base)
        weight = jnp.concatenate([original(path, at) for at in places]) if places else original(path, None)
        if not isinstance(leaf, LowRank):
            return weight
        start = _fit(path, leaf, original, 1)
        change = low_rank_delta(leaf).astype(jnp.float32) - low_rank_delta(start).astype(jnp.float32)
        return (weight.astype(jnp.float32) + change).astype(weight.dtype)

    return map_named(one, params)


def _places(base: Quantized) -> list[slice]:
    """Slices of the first axis that hold one stacked weight each; empty for a weight that is not stacked."""
    return [slice(i, i + 1) for i in range(base.array.stack[0])] if base.array.stack else []


def _fit(path: str, leaf: LowRank, original: Original, turns: int) -> LowRank:
    """One weight, each stacked part of it on its own."""
    parts = []
    for at in _places(leaf.base) or [None]:
        base, scale = leaf.base, jnp.asarray(leaf.scale)
        if at is not None:
            base = jax.tree.map(lambda x, at=at: x[at], base)
            scale = scale[at] if scale.ndim else scale
        weight = original(path, at)
        if not bool(jnp.isfinite(weight).all()):
            raise LoraxError(f"{path}: holds NaN or infinity, which has no code; mend the weight first")
        a, b = _factors(weight, base, scale, leaf.axes, leaf.rank)
        for _ in range(turns - 1):
            base = _moved(weight, base, LowRank(None, a, b, scale, leaf.axes))
            a, b = _factors(weight, base, scale, leaf.axes, leaf.rank)
        # After one turn the base is the one that was there.
        parts.append((base if turns > 1 else None, a.astype(leaf.A.dtype), b.astype(leaf.B.dtype)))
    base, a, b = jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if len(parts) > 1 else parts[0]
    return replace(leaf, base=base or leaf.base, A=a, B=b)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _factors(
    weight: jax.Array, base: Quantized, scale: jax.Array, axes: Axes, rank: int
) -> tuple[jax.Array, jax.Array]:
    """The best correction of what quantising lost."""
    return best_factors(weight.astype(jnp.float32) - base.dense().astype(jnp.float32), axes, rank, scale)


@jax.jit
def _moved(weight: jax.Array, base: Quantized, change: LowRank) -> Quantized:
    """What the factors leave of the weight, in the format, the blocks and the order of codes that the base has."""
    rest = weight.astype(jnp.float32) - low_rank_delta(change).astype(jnp.float32)
    return quantize_like(rest.astype(base.dtype), base)
