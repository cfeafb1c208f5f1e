"""`combine`: several adapters of one base as one. `extract_lora`: a full fine-tune as an adapter.

Everything is said of the changes dW_i = s_i A_i B_i, weight by weight, not of A and B apart: a sum of factors has cross
terms A_i B_j that belong to no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax.linalg as linalg
from lorax.choose import choose, is_floating_matrix
from lorax.errors import LoraxError
from lorax.paths import Pattern, as_patterns, path_of
from lorax.rebase import factors_of, reduced
from lorax.spec import LoraSpec
from lorax.tree import map_named, named_leaves
from lorax.weights import Axes, Change, Full, LowRank, as_matrices, check_rank, dense, is_structured

METHODS = ("linear", "cat", "svd", "ties", "dare")

# A direction whose singular value is below this share of the largest is rounding.
ROUNDING = 1e-6


def combine(
    adapters: Sequence[Any],
    weights: Sequence[float],
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float = 0.5,
    key: jax.Array | None = None,
) -> Any:
    """Several adapters of one base as one adapter.

    With dW_i the change of adapter i and w_i its weight:

    - `"linear"`: sum w_i dW_i, exactly, at the least rank that holds it.
    - `"cat"`: the same sum with the factors side by side, A = [w_1 s_1 A_1, w_2 s_2 A_2, ...], ranks added.
    - `"svd"`: the best approximation of the sum at `rank` (by default the largest of the adapters').
    - `"ties"`: of each dW_i the `density` largest numbers; for each place the sign that weighs more; the mean of the
      w_i dW_i that agree with it. Then the best approximation at `rank`.
    - `"dare"`: of each dW_i a share `density` of the numbers at random, over `density`, summed. Then as above.

    The first three work on the factors; the last two build one layer's change at a time.

    Args:
        adapters: trees with low-rank leaves (`extract`, `load_adapter`, adapted trees). Weights that only some of them
            change count as unchanged in the others.
        weights: a number each.
        method: one of the above.
        rank: of the result, for `"svd"`, `"ties"` and `"dare"`.
        density: share of the numbers that `"ties"` and `"dare"` keep, above 0 and at most 1.
        key: a JAX random key, for `"dare"`.

    Returns:
        A tree of the first adapter's structure, its base kept where it has one; scale 1, factors in float32.

    Raises:
        LoraxError: an unknown method, a weight too few, changes that are no sums (DoRA), whole weights (`train_also`),
            shapes that differ.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.zeros((6, 8))}
        >>> spec = lorax.LoraSpec(targets="w", rank=2)
        >>> one, two = (lorax.extract(lorax.adapt(jax.random.key(i), base, spec)) for i in (0, 1))
        >>> lorax.combine([one, two], [0.7, 0.3], method="cat")["w"]
        LowRank(shape=(6, 8), rank=4, base=no base)

    Source: Yadav et al. 2023, "TIES-Merging"; Yu et al. 2023, "Language Models are Super Mario" (DARE).
    """
    if method not in METHODS:
        raise LoraxError(f"combine: method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not adapters or len(adapters) != len(weights):
        raise LoraxError(f"combine: {len(adapters)} adapters and {len(weights)} weights; give one weight for each")
    if not 0 < density <= 1:
        raise LoraxError(f"combine: density must be above 0 and at most 1, not {density!r}")
    if method == "dare" and key is None:
        raise LoraxError("combine: method='dare' draws at random; pass key")
    named = [_changes(adapter) for adapter in adapters]
    paths = list(dict.fromkeys(path for changes in named for path in changes))
    settings = _Settings(method, rank, density, key)
    made = {
        path: _one(
            path, [(w, changes[path]) for w, changes in zip(weights, named, strict=True) if path in changes], settings
        )
        for path in paths
    }
    empty = lambda x: x is None or is_structured(x)  # noqa: E731
    keyed, treedef = jax.tree_util.tree_flatten_with_path(adapters[0], is_leaf=empty)
    places = {path_of(keys): leaf for keys, leaf in keyed}
    for path in made:
        if path not in places:
            raise LoraxError(f"{path}: the first adapter's tree has no such place; the adapters are of different bases")
    leaves = [_placed(made[path], leaf) if path in made else leaf for path, leaf in places.items()]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _placed(change: LowRank, leaf: Any) -> Any:
    """The change over what stood there: a base of the first adapter's tree, or nothing."""
    return change.with_base(leaf) if leaf is not None and not isinstance(leaf, Change) else change


class _Settings(NamedTuple):
    method: str
    rank: int | None
    density: float
    key: jax.Array | None


def _changes(adapter: Any) -> dict[str, LowRank]:
    out = {}
    for path, leaf in named_leaves(adapter):
        if isinstance(leaf, Change):
            plain = leaf.low_rank()
            if plain is None:
                raise LoraxError(
                    f"{path}: a {type(leaf).__name__} is no sum of the base and a change; merge it instead"
                )
            out[path] = plain
        elif is_structured(leaf) and not hasattr(leaf, "array"):
            raise LoraxError(
                f"{path}: was trained as a whole, and only low-rank changes can be combined; merge it instead"
            )
    return out


def _one(path: str, parts: list[tuple[float, LowRank]], settings: _Settings) -> LowRank:
    first = parts[0][1]
    for _, leaf in parts:
        if tuple(leaf.shape) != tuple(first.shape) or leaf.axes != first.axes:
            raise LoraxError(
                f"{path}: the adapters have {first.shape} and {leaf.shape} here: they are of different bases"
            )
    joined = _joined(first, parts)
    if settings.method == "cat":
        return joined
    if settings.method == "linear":
        return reduced(joined, max(1, _numerical_rank(joined)))
    rank = settings.rank or max(leaf.rank for _, leaf in parts)
    check_rank(path, rank, first.shape, first.axes)
    if settings.method == "svd":
        return reduced(joined, rank)
    return _dense_merge(first, parts, rank, settings)


def _joined(first: LowRank, parts: list[tuple[float, LowRank]]) -> LowRank:
    """The sum as one low-rank change, its factors side by side."""
    pairs = [(a * weight, b) for (weight, leaf) in parts for a, b in [factors_of(leaf)]]
    return _as_leaf(first, jnp.concatenate([a for a, _ in pairs], -1), jnp.concatenate([b for _, b in pairs], -2))


def _as_leaf(like: LowRank, a: jax.Array, b: jax.Array) -> LowRank:
    s, i = len(like.axes.stack), len(like.axes.inputs)
    stack, ins, outs = like.A.shape[:s], like.A.shape[s : s + i], like.B.shape[s + 1 :]
    a, b = a.reshape(*stack, *ins, a.shape[-1]), b.reshape(*stack, b.shape[-2], *outs)
    return LowRank(like.base, a, b, jnp.ones((), jnp.float32), like.axes, like.dropout)


def _numerical_rank(leaf: LowRank) -> int:
    """The largest rank of the matrices of a change, by its own factors."""
    values = np.asarray(linalg.product(*factors_of(leaf)).values)
    return int((values > ROUNDING * np.maximum(values[..., :1], 1e-30)).sum(-1).max())


def _dense_merge(first: LowRank, parts: list[tuple[float, LowRank]], rank: int, settings: _Settings) -> LowRank:
    """TIES or DARE of each matrix in turn, and its best approximation at `rank`."""
    weights_of = [weight for weight, _ in parts]
    pairs = [tuple(x.reshape(-1, *x.shape[-2:]) for x in factors_of(leaf)) for _, leaf in parts]
    rows = []
    for i in range(pairs[0][0].shape[0]):
        changes = jnp.stack([jnp.matmul(a[i], b[i], precision=linalg.HIGHEST) for a, b in pairs])
        weights = jnp.asarray(weights_of, jnp.float32)
        if settings.method == "ties":
            merged = ties(changes, weights, settings.density)
        else:
            assert settings.key is not None
            merged = dare(jax.random.fold_in(settings.key, i), changes, weights, settings.density)
        found = linalg.top(merged, rank)
        root = jnp.sqrt(found.values)
        rows.append((found.u * root, root[:, None] * found.v))
    stack = first.A.shape[: len(first.axes.stack)]
    a, b = (jnp.stack(side) for side in zip(*rows, strict=True))
    return _as_leaf(first, a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:]))


def ties(changes: jax.Array, weights: jax.Array, density: float) -> jax.Array:
    """Trim, elect a sign, and take the mean of those that agree with it, for each number of a matrix.

    Args:
        changes: `(adapters, in, out)`.
        weights: `(adapters,)`.
    """
    count = max(1, round(density * changes[0].size))
    flat = jnp.abs(changes).reshape(len(changes), -1)
    least = jax.lax.top_k(flat, count)[0][:, -1]
    trimmed = jnp.where(jnp.abs(changes) >= least[:, None, None], changes, 0.0)
    weighted = trimmed * weights[:, None, None]
    agree = (jnp.sign(weighted) == jnp.sign(weighted.sum(0))) & (weighted != 0)
    return jnp.where(agree, weighted, 0.0).sum(0) / jnp.maximum(agree.sum(0).astype(weighted.dtype), 1.0)


def dare(key: jax.Array, changes: jax.Array, weights: jax.Array, density: float) -> jax.Array:
    """Drop numbers at random, rescale the rest so that the mean stays, and sum."""
    kept = jax.random.bernoulli(key, density, changes.shape)
    return jnp.sum(jnp.where(kept, changes / density, 0.0) * weights[:, None, None], axis=0)


class Extracted(NamedTuple):
    """An adapter made of a full fine-tune, and what it leaves out.

    adapted: the base with the change over it, `LowRank` for matrices, `Full` for what else changed.
    errors: path -> ||dW - s A B||_F / ||dW||_F, of all matrices of a weight together.
    """

    adapted: Any
    errors: dict[str, float]


def extract_lora(
    base: Any,
    finetuned: Any,
    rank: int | Mapping[Any, int] = 16,
    targets: Pattern | tuple[Pattern, ...] = "*",
    axes: Callable[[str], Axes] | None = None,
) -> Extracted:
    """The best rank-r adapter of a full fine-tune: the truncated SVD of W' - W.

    The error is what Eckart and Young say is the least: sqrt(sum of the squared singular values left out). Weights that
    are no matrices (norms, biases) and those outside `targets` come along whole (`Full`) if they changed; weights that
    did not change stay as they are.

    Args:
        base: the plain tree before.
        finetuned: the plain tree after, of the same structure.
        rank: of all changes, or pattern -> rank; at most min(in, out) is used.
        targets: which of the changed matrices get factors.
        axes: path -> roles of the axes; by default the last two are the matrix, those before stacked.

    Returns:
        The adapted tree and the error of each low-rank change.

    Raises:
        LoraxError: trees of different structure or shapes; a pattern that matches nothing.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base, change = {"w": jnp.ones((6, 8))}, jnp.outer(jnp.arange(6.0), jnp.arange(8.0))
        >>> found = lorax.extract_lora(base, {"w": base["w"] + change}, rank=1)
        >>> found.adapted["w"], found.errors["w"] < 1e-5
        (LowRank(shape=(6, 8), rank=1, base=float32), True)

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    named, after = named_leaves(base), dict(named_leaves(finetuned))
    chosen = set(choose(as_patterns(targets), named, "targets"))
    errors: dict[str, float] = {}

    def one(path: str, leaf: Any) -> Any:
        new = after.get(path)
        if new is None or tuple(new.shape) != tuple(leaf.shape):
            raise LoraxError(
                f"{path}: the fine-tuned tree has {'none' if new is None else new.shape}, and the base {leaf.shape}"
            )
        new = dense(new)
        change = np.asarray(new, np.float32) - np.asarray(dense(leaf), np.float32)
        if not change.any():
            return leaf
        if path not in chosen or not is_floating_matrix(leaf):
            return Full(jnp.asarray(new))
        place = Axes.default(len(leaf.shape)) if axes is None else axes(path)
        out, errors[path] = _truncated(leaf, change, place, LoraSpec(rank=rank).rank_for(path))
        return out

    if len(after) != len(named):
        raise LoraxError(f"extract_lora: the trees have {len(named)} and {len(after)} weights; pass two of one model")
    return Extracted(map_named(one, base), errors)


def _truncated(leaf: Any, change: np.ndarray, axes: Axes, rank: int) -> tuple[LowRank, float]:
    matrices = np.asarray(as_matrices(jnp.asarray(change), axes))
    stack, (ins, outs) = matrices.shape[:-2], matrices.shape[-2:]
    flat, rank = matrices.reshape(-1, ins, outs), min(rank, ins, outs)
    a, b = np.zeros((len(flat), ins, rank), np.float32), np.zeros((len(flat), rank, outs), np.float32)
    left = 0.0
    # One matrix at a time: the SVD of a whole stack would hold all of its U and V at once.
    for i, matrix in enumerate(flat):
        found = linalg.top(jnp.asarray(matrix), rank)
        root = np.sqrt(np.asarray(found.values))
        a[i], b[i] = np.asarray(found.u) * root, root[:, None] * np.asarray(found.v)
        left += float(np.linalg.norm(matrix - a[i] @ b[i])) ** 2
    inputs, outputs = (tuple(leaf.shape[x] for x in group) for group in (axes.inputs, axes.outputs))
    factors = (jnp.asarray(a.reshape(*stack, *inputs, rank)), jnp.asarray(b.reshape(*stack, rank, *outputs)))
    return LowRank(leaf, *factors, jnp.ones((), jnp.float32), axes), left**0.5 / float(np.linalg.norm(flat))
