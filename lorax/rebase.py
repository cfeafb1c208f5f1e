"""`rebase`: a change that started in the weight, as one over the original weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

import lorax.linalg as linalg
from lorax.errors import LoraxError
from lorax.tree import map_named, named_leaves
from lorax.variants.dora import Dora
from lorax.weights import Change, LowRank


def rebase(params: Any, start: Any, base: Any) -> Any:
    """An adapter of PiSSA, MiLoRA or OLoRA as a plain low-rank change of the original weights, of twice the rank.

    With W_res = W - s A0 B0, W_res + s A B = W + s (A B - A0 B0) = W + s [A, A0] [B; -B0]: so what was trained over a
    base of its own goes over the one that everybody has. Ranks above what the matrix allows are reduced, exactly.

    Args:
        params: the tree after training.
        start: the tree as `adapt` returned it (or `extract` of it): its factors are A0 and B0.
        base: the original, plain tree.

    Returns:
        The tree over `base`: `LowRank`, or `Dora` with such a direction; other leaves as they are in `params`.

    Raises:
        LoraxError: the trees do not belong together.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
        >>> start = lorax.adapt(jax.random.key(1), base, lorax.LoraSpec(targets="w", rank=2, init="pissa"))
        >>> trained = jax.tree.map(lambda x: x, start)
        >>> tree = lorax.rebase(trained, start, base)
        >>> tree["w"], bool(jnp.allclose(lorax.merge(tree)["w"], base["w"], atol=1e-6))
        (LowRank(shape=(6, 8), rank=4, base=float32), True)

    Source: Meng et al. 2024, "PiSSA", section "converting PiSSA to LoRA".
    """
    first, plain = dict(named_leaves(start)), dict(named_leaves(base))

    def one(path: str, leaf: Any) -> Any:
        return _one(path, leaf, first.get(path), plain.get(path)) if isinstance(leaf, Change) else leaf

    return map_named(one, params)


def _one(path: str, leaf: Any, before: Any, base: Any) -> Any:
    if type(before) is not type(leaf) or base is None or tuple(base.shape) != tuple(leaf.shape):
        raise LoraxError(f"{path}: is not changed in the same way in all of the trees; pass those of one adaptation")
    if isinstance(leaf, Dora):
        return replace(leaf, weight=_over(leaf.weight, before.weight, base))
    if isinstance(leaf, LowRank):
        return _over(leaf, before, base)
    raise LoraxError(f"{path}: is a {type(leaf).__name__}, which has no start in the weight; leave it as it is")


def _over(leaf: LowRank, before: LowRank, base: Any) -> LowRank:
    a = jnp.concatenate([leaf.A, before.A], axis=-1)
    b = jnp.concatenate([leaf.B, -before.B], axis=len(leaf.axes.stack))
    return reduced(LowRank(base, a, b, leaf.scale, leaf.axes, leaf.dropout))


def reduced(leaf: LowRank, rank: int | None = None) -> LowRank:
    """The change at a rank that its matrix allows, or at a lower one: the best approximation, from the factors.

    Args:
        leaf: any rank, also one above min(in, out).
        rank: the largest rank wanted; min(in, out) by default, where nothing is lost.
    """
    s, i = len(leaf.axes.stack), len(leaf.axes.inputs)
    stack, ins, outs = leaf.A.shape[:s], leaf.A.shape[s : s + i], leaf.B.shape[s + 1 :]
    a, b = leaf.A.reshape(*stack, -1, leaf.rank), leaf.B.reshape(*stack, leaf.rank, -1)
    limit = min(a.shape[-2], b.shape[-1])
    rank = limit if rank is None else min(rank, limit)
    if leaf.rank <= rank:
        return leaf
    found = linalg.product(a.astype(jnp.float32), b.astype(jnp.float32))
    root = jnp.sqrt(found.values[..., :rank])
    a, b = found.u[..., :rank] * root[..., None, :], root[..., :, None] * found.v[..., :rank, :]
    a, b = a.astype(leaf.A.dtype), b.astype(leaf.B.dtype)
    return replace(leaf, A=a.reshape(*stack, *ins, rank), B=b.reshape(*stack, rank, *outs))


def factors_of(leaf: LowRank) -> tuple[jax.Array, jax.Array]:
    """A `(*stack, in, r)` with the scale in it and B `(*stack, r, out)`, float32: the change as one product."""
    s = len(leaf.axes.stack)
    a = leaf.A.reshape(*leaf.A.shape[:s], -1, leaf.rank).astype(jnp.float32)
    b = leaf.B.reshape(*leaf.B.shape[:s], leaf.rank, -1).astype(jnp.float32)
    scale = jnp.reshape(leaf.scale, (*leaf.scale.shape, *[1] * (a.ndim - leaf.scale.ndim))).astype(jnp.float32)
    return a * scale, b
