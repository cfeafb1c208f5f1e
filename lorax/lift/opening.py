"""Leaves of an adapted tree as the walk sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.bank import Bank, Selected
from lorax.dropout import Dropped
from lorax.errors import LoraxError
from lorax.lift.banked import Banked
from lorax.lift.deferred import Normed, Shared
from lorax.lift.packed import Packed
from lorax.lift.values import Factored, Pieces
from lorax.quantized import Quantized
from lorax.variants.dora import Dora, spread
from lorax.variants.vera import Vera
from lorax.weights import Axes, Concat, Full, LowRank, inverse_order


def open_leaf(leaf: Any, path: str) -> Any:
    """A leaf of an adapted tree as the walk sees it: an array or a `Value`."""
    if isinstance(leaf, Full):
        return leaf.value
    if isinstance(leaf, Concat):
        return Pieces(tuple(open_leaf(part, path) for part in leaf.parts), path)
    if isinstance(leaf, LowRank):
        return _open_low_rank(leaf, path)
    if isinstance(leaf, Selected):
        return _open_selected(leaf, path)
    if isinstance(leaf, Bank):
        raise LoraxError(f"{path}: holds the changes of {leaf.slots} adapters; lorax.select says which one acts")
    if isinstance(leaf, Quantized):
        return Packed.open(leaf, path)
    if isinstance(leaf, Dora):
        return Normed(open_leaf(leaf.weight, path), spread(leaf.magnitude, leaf.axes), path)
    if isinstance(leaf, Vera):
        return _open_vera(leaf, path)
    if isinstance(leaf, Dropped):
        key = _broadcast(leaf.key, leaf.axes, "stack")
        return replace(open_leaf(leaf.weight, path), key=key, rate=leaf.weight.dropout)
    return leaf


def _open_selected(leaf: Selected, path: str) -> Banked:
    if leaf.bank.base is None:
        raise LoraxError(f"{path}: a bank without its base computes nothing; lorax.attach(base, bank) first")
    return Banked.open(leaf, open_leaf(leaf.bank.base, path), path)


def _open_low_rank(leaf: LowRank, path: str) -> Factored:
    stack, inputs, outputs = leaf.axes.stack, leaf.axes.inputs, leaf.axes.outputs
    s, i, o = len(stack), len(inputs), len(outputs)
    # The factors' own axes stay in order; those they do not have come in as ones. B's rank goes from (stack, rank, out)
    # to the end.
    a = _with_ones(leaf.A, s + i, o)
    last = (*range(s), *range(s + 1, s + 1 + o), s)
    b = _with_ones(jax.lax.transpose(leaf.B, last), s, i)
    scale = _with_ones(leaf.scale, leaf.scale.ndim, s + i + o - leaf.scale.ndim)
    order = inverse_order(leaf.axes.order)
    if order != tuple(range(s + i + o)):
        a, b = (jax.lax.transpose(x, (*order, len(order))) for x in (a, b))
        scale = jax.lax.transpose(scale, order)
    return Factored(open_leaf(leaf.base, path), a, b, scale, path)


def _open_vera(leaf: Vera, path: str) -> Shared:
    o = len(leaf.axes.outputs)
    a = _broadcast(leaf.A, leaf.axes, "inputs")
    b = _broadcast(jax.lax.transpose(leaf.B, (*range(1, 1 + o), 0)), leaf.axes, "outputs")
    d = _broadcast(leaf.d, leaf.axes, "stack")
    m = jnp.expand_dims(spread(leaf.b, leaf.axes), len(leaf.axes.order))
    return Shared(open_leaf(leaf.base, path), a, b, d, m, path)


def _broadcast(x: jax.Array, axes: Axes, role: str) -> jax.Array:
    """An array with the axes of one role, and one more, as one that broadcasts against the weight."""
    sizes = [len(axes.stack), len(axes.inputs), len(axes.outputs)]
    at = ("stack", "inputs", "outputs").index(role)
    x = _with_ones(_with_ones(x, sizes[at], sum(sizes[at + 1 :])), 0, sum(sizes[:at]))
    order = inverse_order(axes.order)
    return jax.lax.transpose(x, (*order, len(order))) if order != tuple(range(len(order))) else x


def _with_ones(x: jax.Array, at: int, count: int) -> jax.Array:
    """`count` axes of size one before axis `at`: what `expand_dims` binds, less its checks; each weight has three."""
    shape = (*x.shape[:at], *(1,) * count, *x.shape[at:])
    kept = (*range(at), *range(at + count, len(shape)))
    return jax.lax.broadcast_in_dim(x, shape, kept) if count else x
