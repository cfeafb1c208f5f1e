"""LoRA+: B learns faster than A.

    A <- A - eta G_A,      B <- B - lambda eta G_B,      lambda > 1 (about 16)

where G is what the optimizer makes of the gradient. With equal rates A moves too little for wide layers. Source: Hayou,
Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import optax

from lorax.errors import LoraxError
from lorax.variants.dora import Dora
from lorax.weights import Concat, LowRank, is_structured


def lora_plus(tx: optax.GradientTransformation, ratio: float = 16.0) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates of every B are `ratio` times those of `tx`; all other updates are as they were.

    With Adam and its kin that is a learning rate of its own for B (decoupled weight decay goes with it).

    Args:
        tx: any Optax transformation, its learning rate included.
        ratio: lambda, the learning rate of B over that of A.

    Raises:
        LoraxError: a ratio that is not a positive number.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> tree = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=1))
        >>> trainable, _ = lorax.split(tree)
        >>> tx = lorax.lora_plus(optax.sgd(0.5), ratio=4.0)
        >>> moved, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
        >>> float(moved["w"].A[0, 0]), float(moved["w"].B[0, 0])
        (-0.5, -2.0)

    Source: Hayou, Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
        raise LoraxError(f"lora_plus: ratio must be a positive number, not {ratio!r}")
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        moved, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda leaf: _faster(leaf, ratio), moved, is_leaf=is_structured), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _faster(leaf: Any, ratio: float) -> Any:
    if isinstance(leaf, Concat):
        return Concat(tuple(_faster(part, ratio) for part in leaf.parts))
    if isinstance(leaf, Dora):
        return replace(leaf, weight=_faster(leaf.weight, ratio))
    # Among frozen neighbours (a whole tree of updates) B may be left out.
    return replace(leaf, B=leaf.B * ratio) if isinstance(leaf, LowRank) and leaf.B is not None else leaf
