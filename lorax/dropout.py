"""Dropout on the low-rank path: y = x W0 + s (m * x) A B / (1 - p), m a mask of ones and zeros.

An adapted tree knows its rate (`LoraSpec.dropout`) and drops nothing: it is what one evaluates. `dropout(params, key)`
is the tree for one training step.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from lorax.paths import path_of
from lorax.variants.dora import Dora
from lorax.weights import Change, Structured, is_structured, register


@register
@dataclass(frozen=True, eq=False)
class Dropped(Structured):
    """A low-rank change with a key for the mask of its inputs: `(*stack, 2)` words, so that each layer has its own."""

    weight: Any
    key: UInt32[Array, "*stack 2"]

    @property
    def base(self) -> Any:
        return self.weight.base

    @property
    def axes(self) -> Any:
        return self.weight.axes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def dense(self) -> jax.Array:
        return self.weight.dense()


def dropout(params: Any, key: jax.Array) -> Any:
    """The tree for one step of training with dropout: lifted functions drop inputs of the low-rank path at random.

    The base path sees every input. Each weight, and each layer of a stacked one, has a mask of its own, drawn anew from
    `key`. Trees whose rates are all zero come back as they are.

    Args:
        params: an adapted tree; the rates are those of its `LoraSpec`.
        key: a JAX random key, a new one for every step.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> spec = lorax.LoraSpec(targets="w", rank=2, dropout=0.5)
        >>> tree = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, spec)
        >>> step = lorax.dropout(tree, jax.random.key(1))
        >>> lorax.lift(lambda p, x: x @ p["w"])(step, jnp.ones((4, 3))).shape
        (4, 5)

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", appendix D.
    """

    def one(keys: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Change) or not getattr(leaf, "dropout", 0.0):
            return leaf
        change: Any = leaf
        own = jax.random.fold_in(key, zlib.crc32(path_of(keys).encode()))
        stack = tuple(leaf.shape[axis] for axis in leaf.axes.stack)
        words = jax.random.bits(own, (*stack, 2), jnp.uint32)
        if isinstance(change, Dora):
            return replace(change, weight=Dropped(change.weight, words))
        return Dropped(change, words)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_structured)


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x with each number zeroed with probability `rate`, the others divided by 1 - rate.

    Args:
        key: two words, with any number of axes of size one in front.
    """
    words = jax.random.wrap_key_data(key.reshape(-1, 2)[0], impl="threefry2x32")
    kept = jax.random.bernoulli(words, 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
