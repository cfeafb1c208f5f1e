"""`adapt`: the user's tree with structured leaves in the place of the chosen weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.bank import Bank
from lorax.choose import choose, is_all_linear, is_floating_matrix, is_head, linear_by_name
from lorax.errors import LoraxError
from lorax.lift.inputs import second_moments
from lorax.lift.roles import Ledger, axis_uses
from lorax.paths import path_of
from lorax.quantized import Quantized
from lorax.spec import LoraSpec
from lorax.variants.eva import RHO, redistribute
from lorax.variants.eva import shares as explained_shares
from lorax.variants.start import Matrix
from lorax.variants.table import INITS, VARIANTS
from lorax.weights import (
    Axes,
    Change,
    Full,
    LowRank,
    as_matrices,
    check_rank,
    dense,
    is_structured,
    low_rank_delta,
    wider,
)


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
    settings name gets the low-rank change. Other starts (`spec.init`) and other kinds of change (`spec.variant`) begin
    at the same function: `merge` gives the weights back, up to rounding where the start moves the base.

    Args:
        key: a JAX random key. Each weight's A depends on the key and the weight's path alone.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`: a dict, Linen variables, an NNX state.
        spec: which weights, and how.
        fn: the function that the tree will go through, called as `fn(params, *args)`; it is traced, not run. From
            the trace come the roles of each weight's axes: contracted ones are in, scanned and batched ones stacked,
            the others out. Without it the last two axes are the matrix and those before them are stacked.
        args: example or abstract arguments for `fn`; for `init="eva"` a batch of real ones.

    Returns:
        A tree of the same structure; the arrays that were there are shared, not copied.

    Raises:
        LoraxError: a pattern that matches nothing (with near misses), a rank outside 1..min(in, out), a weight that
            no matmul consumes, a tree that is adapted already, a start that asks for values that are not there.

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
    axes = {path: _axes(path, leaf, ledger) for path, leaf in named if path in targets}
    found = _explained(key, named, axes, spec, params, fn, args) if INITS[spec.init].reads_inputs and axes else {}
    leaves = []
    for path, leaf in named:
        if path in targets:
            leaves.append(_change(key, path, leaf, spec, axes[path], found.get(path)))
        else:
            leaves.append(Full(leaf) if path in also else leaf)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _check_plain(named: Sequence[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for path, leaf in named:
        if isinstance(leaf, (Change, Full, Bank)):
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


def _change(key: jax.Array, path: str, leaf: Any, spec: LoraSpec, axes: Axes, found: Found | None = None) -> Any:
    """The structured leaf of one target: base and factors by `spec.init`, in the form of `spec.variant`."""
    rank = spec.rank_for(path) if found is None else found.rank
    matrix = _matrix(key, path, leaf, spec, axes, rank)
    row = INITS[spec.init]
    if row.moves_base and isinstance(leaf, Quantized):
        raise LoraxError(
            f"{path}: is quantised, and init={spec.init!r} takes its factors out of the base; "
            "adapt the plain tree and quantise the result"
        )
    if row.moves_base and matrix.scale == 0:
        raise LoraxError(f"{path}: init={spec.init!r} divides by the scale, and alpha is 0; give another alpha")

    def make(key: jax.Array, base: Any, inputs: Any) -> LowRank:
        m = replace(matrix, key=key, weight=lambda: as_matrices(dense(base).astype(jnp.float32), axes), inputs=inputs)
        a, b = (x.astype(spec.dtype) for x in row.factors(m))
        if found is not None:
            a = a * found.mask(rank).astype(a.dtype)
        stack, ins, outs = (tuple(leaf.shape[i] for i in group) for group in (axes.stack, axes.inputs, axes.outputs))
        a, b = a.reshape(*stack, *ins, rank), b.reshape(*stack, rank, *outs)
        out = LowRank(base, a, b, jnp.float32(matrix.scale), axes, float(spec.dropout))
        return out.with_base(_rest(out)) if row.moves_base else out

    # A weight's own key: the same whatever else is adapted, different for every path.
    own, inputs = jax.random.fold_in(key, zlib.crc32(path.encode())), None if found is None else found.inputs
    abstract = all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))  # a quantised base has several
    made = jax.eval_shape(make, own, leaf, inputs) if abstract else make(own, leaf, inputs)
    # A base that stays is the caller's own array, not a copy.
    made = made if row.moves_base else made.with_base(leaf)
    return VARIANTS[spec.variant].build(made, key, spec.dtype)


def _rest(change: LowRank) -> jax.Array:
    """W - s A B in W's dtype, from the factors as they are stored."""
    wide = wider(change.base.dtype, jnp.float32)
    delta = low_rank_delta(change).astype(wide)
    return (change.base.astype(wide) - delta).astype(change.base.dtype)


def _matrix(key: jax.Array, path: str, leaf: Any, spec: LoraSpec, axes: Axes, rank: int) -> Matrix:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LoraxError(f"{path}: has dtype {jnp.dtype(leaf.dtype).name}; only floating weights can be adapted")
    check_rank(path, rank, leaf.shape, axes)
    stack, ins, outs = (tuple(leaf.shape[i] for i in group) for group in (axes.stack, axes.inputs, axes.outputs))
    # The scale is that of the rank that was asked for, wherever EVA puts ranks.
    return Matrix(
        key, stack, math.prod(ins), math.prod(outs), rank, spec.scale_for(path), spec.dtype, lambda: dense(leaf)
    )


@dataclass(frozen=True)
class Found:
    """What EVA found for one weight: the ranks of its matrices, and the sum of x x^T over their inputs."""

    ranks: np.ndarray
    inputs: jax.Array

    @property
    def rank(self) -> int:
        return int(self.ranks.max())

    def mask(self, rank: int) -> np.ndarray:
        """(*stack, 1, rank) ones for the components that a matrix has. Zeros on both sides never train."""
        return (np.arange(rank) < self.ranks[..., None])[..., None, :].astype(np.float32)


def _explained(
    key: jax.Array,
    named: Sequence[tuple[str, Any]],
    axes: dict[str, Axes],
    spec: LoraSpec,
    params: Any,
    fn: Any,
    args: Any,
) -> dict[str, Found]:
    """EVA's ranks and directions, from the inputs that `fn(params, *args)` brings to each target."""
    if fn is None:
        raise LoraxError("init='eva' reads the inputs of each layer; pass fn and args (a batch of examples) to adapt")
    leaves = dict(named)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, [leaves[path] for path in axes]))):
        raise LoraxError("init='eva' reads the inputs of each layer; pass concrete weights and a batch as args")
    moments = second_moments(fn, params, args, axes)
    ranks = {path: spec.rank_for(path) for path in axes}
    shares = {}
    for path, moment in moments.items():
        check_rank(path, ranks[path], leaves[path].shape, axes[path])
        outs = math.prod(leaves[path].shape[i] for i in axes[path].outputs)
        most = min(int(RHO * ranks[path]), moment.shape[-1], outs)
        shares[path] = explained_shares(key, moment, most)
    counts = redistribute(shares, ranks)
    return {path: Found(counts[path], moments[path]) for path in axes}
