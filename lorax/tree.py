"""Adapted trees apart and together again: split and join, extract and attach, merge and unmerge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.bank import Bank, Selected
from lorax.choose import choose
from lorax.errors import LoraxError
from lorax.paths import Pattern, as_patterns, path_of
from lorax.weights import (
    Change,
    Concat,
    Full,
    Structured,
    children,
    dense,
    is_structured,
    low_rank_delta,
    wider,
    with_children,
)


def named_leaves(params: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every weight, structured ones whole."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_structured)
    return [(path_of(keys), leaf) for keys, leaf in keyed]


def map_named(function: Callable[..., Any], params: Any, *others: Any) -> Any:
    """Map `function(path, leaf, *other_leaves)` over the weights, structured ones whole."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(path_of(keys), *leaves), params, *others, is_leaf=is_structured
    )


def pick(leaf: Any, trains: bool, under_training: bool = False) -> Any:
    """The arrays of a leaf that train (or that do not), None in the place of the others."""
    if isinstance(leaf, Structured):
        picked = {
            name: jax.tree.map(lambda x, name=name: pick(x, trains, name in leaf.TRAINS), value, is_leaf=is_structured)
            for name, value in children(leaf)
        }
        return with_children(leaf, picked)
    return leaf if under_training == trains else None


def split(params: Any) -> tuple[Any, Any]:
    """The tree twice: once with what trains, once with the rest, None where the other has the array.

    Differentiate with respect to the first alone: `jax.grad(lambda t: loss(join(t, frozen)))(trainable)`. On a tree
    that has None in places (the first half itself), the Nones stay.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}
        >>> adapted = lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="kernel", rank=2))
        >>> trainable, frozen = lorax.split(adapted)
        >>> [x.shape for x in jax.tree.leaves(trainable)]
        [(3, 2), (2, 5)]
    """
    trainable = jax.tree.map(lambda leaf: pick(leaf, True), params, is_leaf=is_structured)
    frozen = jax.tree.map(lambda leaf: pick(leaf, False), params, is_leaf=is_structured)
    return trainable, frozen


def _is_none(x: Any) -> bool:
    return x is None


def join(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`.

    Raises:
        LoraxError: the two are not halves of one tree; names the first place where they differ.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=1))
        >>> lorax.join(*lorax.split(adapted))["w"]
        LowRank(shape=(3, 5), rank=1, base=float32)
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=_is_none)
    other, other_treedef = jax.tree_util.tree_flatten(frozen, is_leaf=_is_none)
    if treedef != other_treedef:
        raise LoraxError("join: the two trees have different structures; pass the two halves that split returned")
    leaves = []
    for (keys, left), right in zip(keyed, other, strict=True):
        if left is not None and right is not None:
            raise LoraxError(
                f"join: {path_of(keys)} has a value on both sides; pass the two halves that split returned"
            )
        leaves.append(right if left is None else left)
    return jax.tree_util.tree_unflatten(treedef, leaves)


def merge(
    params: Any,
    audit: bool = False,
    *,
    dtype: Any = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    tolerance: float | None = None,
) -> Any:
    """The plain tree: W + scale A B as one array, in the base's dtype or another.

    Args:
        params: an adapted tree.
        audit: also return what merging costs: a mapping path -> relative error of the merged weight in its dtype,
            `||merged - exact||_F / ||exact||_F` with `exact` in float64, which also has `lost` (the same over the size
            of the change) and, given `fn`, `difference`, the largest difference of an output on the probe batch.
        dtype: of the floating weights of the result; each weight is rounded once, from a float32 sum.
        fn, args: the function and the probe batch of the audit, for instance `model.apply` and token ids.
        tolerance: refuse a merge of which a relative error is larger, of a weight or of the outputs over the largest.

    Returns:
        The plain tree, or `(tree, MergeAudit)`.

    Raises:
        LoraxError: an adapter without its base; an error above the tolerance.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=1))
        >>> lorax.merge(adapted)["w"].shape
        (3, 5)
        >>> apply = lambda params, x: x @ params["w"]
        >>> tree, found = lorax.merge(adapted, audit=True, dtype=jnp.bfloat16, fn=apply, args=(jnp.ones((2, 3)),))
        >>> tree["w"].dtype.name, dict(found), found.difference
        ('bfloat16', {'w': 0.0}, 0.0)
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise LoraxError(f"merge: tolerance must be a finite number of at least 0, not {tolerance!r}")

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, (Bank, Selected)):
            raise LoraxError(f"{path}: is a bank of many adapters; take one out with lorax.unstack, and merge that")
        if isinstance(leaf, Change) and leaf.base is None:
            raise LoraxError(f"{path}: an adapter without its base cannot be merged; attach it first")
        return dense(leaf) if dtype is None else _dense_in(leaf, dtype)

    tree = map_named(one, params)
    if not audit and tolerance is None:
        return tree
    from lorax.audit import audit as compare  # it needs trees, as this module makes them

    found = compare(params, tree, fn, args)
    if tolerance is not None:
        found.check(tolerance)
    return (tree, found) if audit else tree


def _dense_in(leaf: Any, dtype: Any) -> Any:
    """The plain array of a leaf in a dtype, with no narrower one on the way."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return dense(leaf)
    if isinstance(leaf, Change):
        base = jnp.asarray(dense(leaf.base))
        leaf = leaf.with_base(base.astype(wider(wider(base.dtype, dtype), jnp.float32)))
    return jnp.asarray(dense(leaf)).astype(dtype)


def unmerge(params: Any, adapter: Any) -> Any:
    """Take an adapter's change out of a merged tree: W - scale A B, equal to the base within its dtype's rounding.

    Args:
        params: the plain merged tree.
        adapter: what `extract` returned, or the adapted tree.

    Raises:
        LoraxError: an adapter for another tree, or one that replaced whole weights (`train_also`): those are gone.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=1))
        >>> bool((lorax.unmerge(lorax.merge(adapted), adapted)["w"] == 1).all())
        True
    """
    changes = dict(named_leaves(adapter))
    _check_paths(params, changes)

    def one(path: str, leaf: Any) -> Any:
        change = changes.get(path)
        if isinstance(change, (Full, Concat)):
            raise LoraxError(f"{path}: was trained as a whole, so the merged weight does not hold the base; reload it")
        if not isinstance(change, Change):
            return leaf
        change = change.low_rank()
        if change is None:
            raise LoraxError(f"{path}: its change is no sum, so it cannot be taken out of a merged weight; reload it")
        delta = low_rank_delta(change)
        wide = wider(leaf.dtype, delta.dtype)
        return (leaf.astype(wide) - delta.astype(wide)).astype(leaf.dtype)

    return map_named(one, params)


def extract(params: Any) -> Any:
    """The adapter alone: the tree with every base weight left out (None in its place).

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=1))
        >>> lorax.extract(adapted)["w"]
        LowRank(shape=(3, 5), rank=1, base=no base)
    """

    def without_base(leaf: Any) -> Any:
        if isinstance(leaf, Bank):
            return replace(leaf, base=None)
        if isinstance(leaf, Change):
            return leaf.with_base(None)
        if isinstance(leaf, Concat):
            return Concat(tuple(without_base(part) for part in leaf.parts))
        return leaf if isinstance(leaf, Full) else None

    return jax.tree.map(without_base, params, is_leaf=is_structured)


def attach(base: Any, adapter: Any) -> Any:
    """Put an adapter over a base: the inverse of `extract`.

    Args:
        base: the plain tree.
        adapter: a tree whose structured leaves stand at paths of the base; other paths are not needed.

    Raises:
        LoraxError: the adapter does not fit; names the first path that is missing or has another shape.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((3, 5))}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=1))
        >>> lorax.attach(base, lorax.extract(adapted))["w"]
        LowRank(shape=(3, 5), rank=1, base=float32)
    """
    changes = {path: leaf for path, leaf in named_leaves(adapter) if is_structured(leaf)}
    _check_paths(base, changes)
    return map_named(lambda path, leaf: _put(path, leaf, changes[path]) if path in changes else leaf, base)


def _check_paths(base: Any, changes: dict[str, Any]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(base)}
    for path, change in changes.items():
        if not is_structured(change):
            continue
        if path not in shapes:
            raise LoraxError(
                f"{path}: the adapter changes this weight and the base has none there: it is for another base"
            )
        if not isinstance(change, Concat) and tuple(change.shape) != shapes[path]:
            raise LoraxError(
                f"{path}: the adapter is for shape {tuple(change.shape)} and the base has {shapes[path]}: "
                "it is for another base"
            )


def _put(path: str, leaf: Any, change: Any) -> Any:
    if isinstance(change, Bank):
        return replace(change, base=leaf)
    if isinstance(change, Change):
        return change.with_base(leaf)
    if isinstance(change, Concat):
        return _put_pieces(path, leaf, change)
    return change


def _put_pieces(path: str, leaf: Any, change: Concat) -> Concat:
    """Fill the frozen pieces from the base: one of them may be of unknown length."""
    known = sum(part.shape[0] for part in change.parts if part is not None)
    missing = sum(part is None for part in change.parts)
    if missing > 1 or (missing == 0 and known != leaf.shape[0]) or known > leaf.shape[0]:
        raise LoraxError(f"{path}: the adapter's pieces do not add up to the base's {leaf.shape[0]} layers")
    parts, at = [], 0
    for part in change.parts:
        size = leaf.shape[0] - known if part is None else part.shape[0]
        rows = leaf[at : at + size]
        parts.append(rows if part is None else _put(path, rows, part))
        at += size
    return Concat(tuple(parts))


def train_last(params: Any, k: int, pattern: Pattern = "layers/*") -> Any:
    """A tree of which the last `k` layers train: each stacked weight becomes `Concat((frozen, Full(last k)))`.

    Args:
        params: a plain tree whose weights under `pattern` are stacked over layers along axis 0.
        k: how many layers train, 1 to the number of layers.
        pattern: which weights are stacked layers.

    Raises:
        LoraxError: k outside that range, no weight matches, or the matched weights disagree about the layers.

    Example:
        >>> import jax.numpy as jnp
        >>> train_last({"layers": {"kernel": jnp.ones((6, 3, 5))}}, 2)["layers"]["kernel"]
        Concat(array(4, 3, 5), Full(shape=(2, 3, 5)))
    """
    named = named_leaves(params)
    chosen = set(choose(as_patterns(pattern), named, "pattern"))
    counts = {leaf.shape[0] if leaf.shape else 0 for path, leaf in named if path in chosen}
    if len(counts) != 1:
        raise LoraxError(
            f"last-k: the weights under {pattern!r} are not stacked over the same layers ({sorted(counts)})"
        )
    for path, leaf in named:
        if path in chosen and is_structured(leaf):
            raise LoraxError(
                f"last-k: {path} is a {type(leaf).__name__} and cannot train as a whole; load it in 16 bits"
            )
    (layers,) = counts
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= layers:
        raise LoraxError(f"last-k: k must be a whole number from 1 to the {layers} layers, not {k!r}")

    def one(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        return Full(leaf) if k == layers else Concat((leaf[: layers - k], Full(leaf[layers - k :])))

    return map_named(one, params)
