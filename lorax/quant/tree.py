"""`quantize` and `dequantize`: a tree's chosen weights in 4 bits and back, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.choose import choose, is_all_linear, is_floating_matrix, is_head, linear_by_name
from lorax.errors import LoraxError
from lorax.lift.roles import axis_uses
from lorax.paths import Pattern, as_patterns
from lorax.quantized import Quantized, to_stored
from lorax.tree import map_named, named_leaves
from lorax.weights import Axes, Change, is_structured
from lorax.weights import dense as dense_of
from lorax_kernels import nf4


def quantize(
    params: Any,
    targets: Pattern | Sequence[Pattern] = "all-linear",
    format: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    platform: str | None = None,
) -> Any:
    """The tree with `Quantized` leaves where `targets` points.

    A kernel (in, out) is quantised in blocks along its inputs, as torch models are; stacked weights (scanned layers,
    experts) each on their own. Weights are done one after the other: while one is at work, the others are as they
    were or packed.

    Args:
        params: a tree of arrays or `jax.ShapeDtypeStruct`; low-rank leaves keep their factors and get a quantised base.
        targets: a pattern, several, or `"all-linear"`, as in `LoraSpec`.
        format: `"nf4"`, `"fp4"`, `"int8"` or `"bf16"`.
        double_quant: scales in 8 bits: 4.127 bits a parameter, else 4.5.
        block_size: parameters that share a scale: 32, 64, 128 or 256.
        fn: as in `adapt`: the roles of the axes are read from a trace of `fn(params, *args)`. Without it the last two
            axes are the matrix and those before them are stacked; weights named like embeddings keep their order.
        args: example or abstract arguments for `fn`.
        platform: whose kernels will read the codes, by default this process's: on `"tpu"` they are kept in the order
            that a TPU unpacks, which changes no value; files have one order.

    Returns:
        A tree of the same structure.

    Raises:
        LoraxError: a pattern that matches nothing, a weight that is quantised already, or one that holds NaN or
            infinity; names the path.

    Example:
        >>> import jax.numpy as jnp, lorax
        >>> lorax.quantize({"kernel": jnp.ones((64, 8))}, targets="kernel")["kernel"]
        Quantized(shape=(64, 8), format=nf4, 4.250 bits)

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
    """
    named = named_leaves(params)
    patterns = as_patterns(targets)  # pyright: ignore[reportArgumentType]
    everything = is_all_linear(patterns)
    ledger = None
    if not everything:
        chosen = choose(patterns, named, "targets")
    elif fn is None:
        chosen = linear_by_name(named)
    else:
        chosen = [p for p, leaf in named if is_floating_matrix(leaf)]
    if fn is not None:
        probed = {i: path for i, (path, _) in enumerate(named) if path in set(chosen)}
        ledger = axis_uses(fn, params, args, probed)
        if everything:
            chosen = [p for p in chosen if ledger[p].products and ledger[p].lookup is None and not is_head(p)]
    if not chosen:
        raise LoraxError("targets: 'all-linear' found no weight that a matmul consumes; name the targets by pattern")
    by_name = set(linear_by_name(named))

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        if isinstance(leaf, Change):
            axes = leaf.axes
        else:
            axes = ledger[path].axes(path) if ledger is not None else _by_shape(path, leaf, by_name)
        lookup = ledger is not None and ledger[path].lookup is not None
        return quantize_weight(path, leaf, axes, format, double_quant, block_size, rows=lookup, platform=platform)

    return map_named(one, params)


def _by_shape(path: str, leaf: Any, by_name: set[str]) -> Axes:
    ndim = len(leaf.shape)
    if path in by_name and ndim >= 2:
        return Axes.default(ndim)
    # Not a matmul's weight by its name: blocks run along the last axis, as they lie.
    return Axes((), (ndim - 1,) if ndim else (), tuple(range(ndim - 1)))


def quantize_weight(
    path: str,
    leaf: Any,
    axes: Axes,
    format: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    rows: bool = False,
    platform: str | None = None,
) -> Any:
    """One weight as a `Quantized` leaf (a low-rank one with a quantised base).

    Args:
        path: for messages.
        leaf: an array, abstract or concrete, or a `LowRank` of one.
        axes: the roles of its axes; blocks run along the inputs.
        rows: the weight is looked up by its inputs, so blocks run along the outputs.
    """
    if isinstance(leaf, Change):
        base = quantize_weight(path, leaf.base, axes, format, double_quant, block_size, rows, platform)
        return leaf.with_base(base)
    if is_structured(leaf):
        raise LoraxError(f"{path}: is a {type(leaf).__name__} already; quantise the plain tree")
    stack = len(axes.stack) if axes.stack == tuple(range(len(axes.stack))) else 0
    core = (*axes.inputs, *axes.outputs) if rows else (*axes.outputs, *axes.inputs)
    if not stack:
        core = (*axes.stack, *core)
    order = tuple(axis - stack for axis in core)

    def pack(w: jax.Array) -> nf4.QuantizedArray:
        array = nf4.quantize(to_stored(w, order), block_size, double_quant, format, stack)
        return nf4.for_platform(array, platform or jax.default_backend())

    try:
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return Quantized(jax.eval_shape(pack, leaf) if abstract else pack(jnp.asarray(leaf)), order)
    except ValueError as error:
        raise LoraxError(f"{path}: {error}") from None


def dequantize(params: Any) -> Any:
    """The tree with plain arrays in the place of quantised weights, in the dtype they had; low-rank changes stay.

    Example:
        >>> import jax.numpy as jnp, lorax
        >>> packed = lorax.quantize({"kernel": jnp.ones((64, 8))}, targets="kernel")
        >>> lorax.dequantize(packed)["kernel"].shape
        (64, 8)
    """

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Change) and isinstance(leaf.base, Quantized):
            return leaf.with_base(leaf.base.dense())
        return leaf.dense() if isinstance(leaf, Quantized) else leaf

    return map_named(one, params)


def requantize(params: Any) -> tuple[Any, dict[str, float]]:
    """Merge low-rank changes into their quantised bases and quantise the sums again, in the same format.

    Rounding a merged weight to 4 bits loses part of the change. The other way, `merge`, keeps the sum in 16 bits.

    Returns:
        The tree, and for each changed weight ||requantised - merged|| / ||merged - base||: the part of the change that
        rounding costs (0: kept; 1: an error as large as the change itself).

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> packed = lorax.quantize({"kernel": jnp.ones((64, 8))}, targets="kernel")
        >>> tree = lorax.adapt(jax.random.key(0), packed, lorax.LoraSpec(targets="kernel", rank=2))
        >>> lorax.requantize(tree)[0]["kernel"]
        Quantized(shape=(64, 8), format=nf4, 4.250 bits)
    """
    losses: dict[str, float] = {}

    def one(path: str, leaf: Any) -> Any:
        if not (isinstance(leaf, Change) and isinstance(leaf.base, Quantized)):
            return leaf.dense() if isinstance(leaf, Change) else leaf
        old = leaf.base
        merged = dense_of(leaf).astype(jnp.float32)
        try:
            new = quantize_like(merged.astype(old.dtype), old)
        except ValueError as error:
            raise LoraxError(f"{path}: {error}") from None
        change = float(jnp.linalg.norm(merged - old.dense().astype(jnp.float32)))
        error = float(jnp.linalg.norm(new.dense().astype(jnp.float32) - merged))
        losses[path] = error / change if change else 0.0
        return new

    return map_named(one, params), losses


def quantize_like(weight: jax.Array, like: Quantized) -> Quantized:
    """Another weight in the format, the blocks and the order of codes of a quantised one."""
    old = like.array
    stored = to_stored(weight, like.order)
    array = nf4.quantize(stored, old.block_size, old.scales2 is not None, old.format, len(old.stack))
    return Quantized(nf4.to_tpu(array) if old.layout == "tpu" else array, like.order)
