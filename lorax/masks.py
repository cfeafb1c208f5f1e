"""What trains, for Optax: a mask over the tree, and a transformation with state for nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax.errors import LoraxError
from lorax.tree import pick, split
from lorax.weights import is_structured


def mask(params: Any) -> Any:
    """A tree of the same structure with True on the arrays that train, False on the others.

    Args:
        params: an adapted tree, or the trainable half of one.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}
        >>> adapted = lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="kernel", rank=2))
        >>> [bool(x) for x in jax.tree.leaves(lorax.mask(adapted))]
        [False, False, True, True, False]
    """

    def one(leaf: Any) -> Any:
        trains = pick(leaf, True)
        return jax.tree.map(lambda x, t: t is not None, leaf, trains, is_leaf=lambda x: x is None)

    return jax.tree.map(one, params, is_leaf=is_structured)


def optimizer(tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that updates what trains and holds no state for the rest.

    `init` and `update` take the adapted tree (or gradients of its structure) as well as its trainable half, as
    `split` returns it. Updates come back in the structure of the gradients; those of frozen arrays are zero.

    Args:
        tx: any Optax transformation.
        params: the adapted tree, checked here for having something that trains.

    Raises:
        LoraxError: nothing in `params` trains.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((9, 7))}, lorax.LoraSpec(targets="w", rank=1))
        >>> tx = lorax.optimizer(optax.adam(1e-3), adapted)
        >>> sum(x.size for x in jax.tree.leaves(tx.init(adapted)))  # 2 (9 + 7) moments and a step count
        33
    """
    if not jax.tree.leaves(split(params)[0]):
        raise LoraxError("optimizer: nothing in this tree trains; adapt it first, with targets or train_also")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(split(params)[0])

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wanted, rest = split(updates)
        current = None if params is None else split(params)[0]
        # Optax mixes Python numbers and integer counts; a session with strict promotion should still run it.
        with jax.numpy_dtype_promotion("standard"):
            moved, state = inner.update(wanted, state, current, **extra)
        still = jax.tree.map(_no_update, rest)
        return _fill(moved, still), state

    return optax.GradientTransformationExtraArgs(init, update)


def _no_update(gradient: Any) -> Any:
    """A zero that `optax.apply_updates` can add. Integer arrays have gradients without a dtype (float0)."""
    if gradient.dtype == jax.dtypes.float0:
        return jnp.zeros(gradient.shape, jnp.int32)
    return jnp.zeros_like(gradient)


def _fill(moved: Any, still: Any) -> Any:
    is_none = lambda x: x is None  # noqa: E731
    return jax.tree.map(lambda m, s: s if m is None else m, moved, still, is_leaf=is_none)
