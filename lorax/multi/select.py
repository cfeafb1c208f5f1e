"""`select`: which adapter of a bank an example, or a row of activations, is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from lorax.bank import Bank, Selected
from lorax.errors import LoraxError
from lorax.multi.names import banks, slot_names, slot_of
from lorax.weights import is_structured


def select(
    params: Any,
    id: int | str | Int[Array, "*ids"] | Sequence[Any] | None,
    weights: Float[Array, "*ids"] | Sequence[float] | None = None,
) -> Any:
    """The parameters of the one adapter with this id, for a lifted function.

    W = base + scale_i A_i B_i. Inside `vmap` over examples the id is a traced number, `x @ W` stays one product for the
    whole batch, and the low-rank part is one grouped operation:

        jax.vmap(lambda id, x: lorax.lift(apply)(lorax.select(params, id), x))(ids, xs)

    Args:
        params: a tree with banks, over their base: `attach(base, stack(adapters))`.
        id: an adapter's number (traced or not), its name, or None or -1 for the base alone. With axes: an id for each
            row of the activations, of which `id` has the leading axes (tokens of a flattened batch), or for each of
            equal blocks of rows.
        weights: the adapters act together: W = base + sum_j weights_j (W_{id_j} - base). The last axis of `id` and of
            `weights` runs over them.

    Returns:
        The tree with each bank's selection in its place. Gradients reach A, B and `weights`.

    Raises:
        LoraxError: no bank in the tree, an unknown name, or ids and weights of different shapes.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((3, 5))}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=2))
        >>> params = lorax.attach(base, lorax.stack({"one": adapted, "two": adapted}))
        >>> apply = lorax.lift(lambda p, x: x @ p["w"])
        >>> ids, xs = lorax.adapter_ids(params, ["two", None]), jnp.ones((2, 4, 3))
        >>> jax.vmap(lambda id, x: apply(lorax.select(params, id), x))(ids, xs).shape
        (2, 4, 5)
    """
    found = banks(params, "select")
    numbers = _numbers(params, id, next(iter(found.values())).slots)
    if weights is None:
        numbers, shares = numbers[..., None], jnp.ones((*numbers.shape, 1), jnp.float32)
    else:
        shares = jnp.asarray(weights, jnp.float32)
        if shares.shape != numbers.shape or not shares.ndim:
            raise LoraxError(
                f"select: ids {numbers.shape} and weights {shares.shape} must have one shape, with an axis"
            )

    def one(leaf: Any) -> Any:
        return Selected(leaf, numbers, shares) if isinstance(leaf, Bank) else leaf

    return jax.tree.map(one, params, is_leaf=is_structured)


def adapter_ids(params: Any, names: Sequence[str | int | None]) -> Int[Array, "ids"]:
    """The numbers of adapters by name, None being the base alone (-1).

    Raises:
        LoraxError: an adapter that is not there, with those that are.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=2))
        >>> lorax.adapter_ids(lorax.stack({"one": adapted, "two": adapted}), ["two", None, "one"]).tolist()
        [1, -1, 0]
    """
    slots = [-1 if name is None else slot_of(params, name, "adapter_ids") for name in names]
    return jnp.asarray(slots, jnp.int32)


def _numbers(params: Any, id: Any, slots: int) -> jax.Array:
    if id is None:
        return jnp.int32(-1)
    if isinstance(id, str):
        return jnp.int32(slot_of(params, id, "select"))
    if isinstance(id, (list, tuple)) and any(i is None or isinstance(i, str) for i in id):
        return adapter_ids(params, id)
    numbers = jnp.asarray(id)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise LoraxError(f"select: an id is a whole number, a name or None, not {numbers.dtype}")
    if not isinstance(numbers, Tracer):
        _check(params, np.asarray(numbers), slots)
    return numbers.astype(jnp.int32)


def _check(params: Any, numbers: np.ndarray, slots: int) -> None:
    """A number that is known must be an adapter's; inside a trace, one outside the bank is the base alone."""
    if numbers.size and (numbers.min() < -1 or numbers.max() >= slots):
        raise LoraxError(f"select: ids run from -1 to {slots - 1}, not {numbers.min()} to {numbers.max()}")
    if isinstance(next(iter(banks(params, "select").values())).names, Tracer):
        return
    names = slot_names(params, "select")
    free = [int(i) for i in np.unique(numbers) if i >= 0 and names[i] is None]
    if free:
        raise LoraxError(f"select: slot {free[0]} is free; ids of adapters are {[i for i, n in enumerate(names) if n]}")
