"""`adapt`: the user's tree with structured leaves in the place of the chosen weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.choose import choose, is_all_linear, is_floating_matrix, is_head, linear_by_name
from lorax.errors import LoraxError
from lorax.lift.roles import Ledger, axis_uses
from lorax.paths import path_of
from lorax.quantized import Quantized
from lorax.spec import LoraSpec
from lorax.weights import Axes, Full, LowRank, check_rank, is_structured


def adapt(
    key: jax.Array,
    params: Any,
    spec: LoraSpec,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> Any:
    """The tree with `LowRank` leaves where `spec.targets` points and `Full` leaves where `spec.train_also` does.

    W becomes W + scale A B with A Gaussian and B zero, so the adapted tree computes what the plain one does. A is
    `(*stack, *in, rank)`, B is `(*stack, rank, *out)`: stacked weights get true factors per layer. A weight that both
    settings name gets the low-rank change.

    Args:
        key: a JAX random key. Each weight's A depends on the key and the weight's path alone.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`: a dict, Linen variables, an NNX state.
        spec: which weights, and how.
        fn: the function that the tree will go through, called as `fn(params, *args)`; it is traced, not run. From
            the trace come the roles of each weight's axes: contracted ones are in, scanned and batched ones stacked,
            the others out. Without it the last two axes are the matrix and those before them are stacked.
        args: example or abstract arguments for `fn`.

    Returns:
        A tree of the same structure; the arrays that were there are shared, not copied.

    Raises:
        LoraxError: a pattern that matches nothing (with near misses), a rank outside 1..min(in, out), a weight that
            no matmul consumes, a tree that is adapted already.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"mlp": {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}}
        >>> lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="mlp/kernel", rank=2))["mlp"]["kernel"]
        LowRank(shape=(6, 8), rank=2, base=float32)

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_structured)
    named = [(path_of(keys), leaf) for keys, leaf in keyed]
    _check_plain(named)
    targets, ledger = _targets(spec, named, params, fn, args)
    also = set(choose(spec.also_patterns, named, "train_also")) - set(targets)
    if not targets and not also:
        raise LoraxError("LoraSpec names nothing to train: give targets or train_also")
    for path, leaf in named:
        if path in also and isinstance(leaf, Quantized):
            raise LoraxError(f"{path}: is quantised and cannot train as a whole; leave it out of train_also")
    leaves = []
    for path, leaf in named:
        if path in targets:
            leaves.append(_low_rank(key, path, leaf, spec, _axes(path, leaf, ledger)))
        else:
            leaves.append(Full(leaf) if path in also else leaf)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _check_plain(named: Sequence[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for path, leaf in named:
        if isinstance(leaf, (LowRank, Full)):
            raise LoraxError(f"{path}: is adapted already; merge it, or adapt the plain tree with one spec for all")
        if path in seen:
            raise LoraxError(f"{path}: two leaves have this path, so no pattern can tell them apart")
        seen.add(path)


def _targets(
    spec: LoraSpec, named: list[tuple[str, Any]], params: Any, fn: Any, args: Sequence[Any]
) -> tuple[list[str], Ledger | None]:
    """The target paths, and the uses of each where a function tells them."""
    patterns = spec.target_patterns
    everything = is_all_linear(patterns)
    if everything and len(patterns) > 1:
        raise LoraxError("LoraSpec: 'all-linear' already stands for every matmul weight; give it alone")
    if fn is None:
        paths = linear_by_name(named) if everything else choose(patterns, named, "targets")
        return _not_empty(paths, everything), None
    paths = [p for p, leaf in named if is_floating_matrix(leaf)] if everything else choose(patterns, named, "targets")
    probed = {i: path for i, (path, _) in enumerate(named) if path in set(paths)}
    ledger = axis_uses(fn, params, args, probed)
    if everything:
        paths = [p for p in paths if ledger[p].products and ledger[p].lookup is None and not is_head(p)]
    return _not_empty(paths, everything), ledger


def _not_empty(paths: list[str], everything: bool) -> list[str]:
    if everything and not paths:
        raise LoraxError("targets: 'all-linear' found no weight that a matmul consumes; name the targets by pattern")
    return paths


def _axes(path: str, leaf: Any, ledger: Ledger | None) -> Axes:
    if ledger is not None:
        return ledger[path].axes(path)
    if len(leaf.shape) < 2:
        raise LoraxError(
            f"{path}: has shape {tuple(leaf.shape)}, and a low-rank change needs a matrix; name it in train_also"
        )
    return Axes.default(len(leaf.shape))


def _low_rank(key: jax.Array, path: str, leaf: Any, spec: LoraSpec, axes: Axes) -> LowRank:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LoraxError(f"{path}: has dtype {jnp.dtype(leaf.dtype).name}; only floating weights can be adapted")
    rank = spec.rank_for(path)
    check_rank(path, rank, leaf.shape, axes)
    stack, ins, outs = (tuple(leaf.shape[i] for i in group) for group in (axes.stack, axes.inputs, axes.outputs))

    def factors(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # A weight's own key: the same whatever else is adapted, different for every path.
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = start(own, spec.init, (*stack, *ins, rank), math.prod(ins), spec.dtype)
        return a, jnp.zeros((*stack, rank, *outs), spec.dtype), jnp.float32(spec.scale_for(path))

    abstract = all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))  # a quantised base has several
    a, b, scale = jax.eval_shape(factors, key) if abstract else factors(key)
    return LowRank(leaf, a, b, scale, axes)


def start(key: jax.Array, init: str, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    """The first value of A: N(0, 1/fan_in) or U(-1, 1)/sqrt(fan_in)."""
    width = 1.0 / math.sqrt(fan_in)
    if init == "uniform":
        return jax.random.uniform(key, shape, dtype, -width, width)
    return (width * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
