"""One optimizer step, as a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt32

Batch = dict[str, Any]
LossFn = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]


class State(NamedTuple):
    """Everything that a run carries from step to step, and so everything that a checkpoint holds.

    Attributes:
        step: optimizer steps taken.
        trainable: what trains; `None` where `frozen` has the leaf.
        opt_state: the optimizer's state, for `trainable` alone.
        receipts: for each trained leaf, the largest |gradient| ever seen; for each of its layers if it is
            stacked.
        rng: raw key data, advanced once a step.
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree
    receipts: PyTree
    rng: UInt32[Array, " words"]


class Metrics(NamedTuple):
    """What one step reports: mean loss in nats, tokens that counted, gradient norm before clipping."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    grad_norm: Float[Array, ""]


def init_state(trainable: PyTree, tx: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step. `trainable` is copied: the step donates its buffers, the caller's
    stay.
    """
    own = jax.tree.map(jnp.copy, trainable)
    receipts = jax.tree.map(lambda x: jnp.zeros(x.shape[:1] if x.ndim > 2 else (), jnp.float32), own)
    return State(jnp.int32(0), own, tx.init(own), receipts, jax.random.key_data(jax.random.key(seed)))


def make_step(
    loss_fn: LossFn, tx: optax.GradientTransformation
) -> Callable[[State, PyTree, Batch], tuple[State, Metrics]]:
    """A jitted training step.

    With micro-batches i of one step, `loss = sum_i S_i / sum_i W_i`, where `loss_fn` returns (S_i, W_i): the
    mean over the tokens of the whole accumulated batch, so accumulating is the same mathematics as one large
    batch, whatever the lengths in it. Gradients are taken with respect to `state.trainable` only.

    Args:
        loss_fn: `(trainable, frozen, batch, key) -> (loss sum, weight sum)`.
        tx: the optimizer, already initialised in the state.

    Returns:
        `step(state, frozen, batches) -> (state, metrics)`. `batches` has a leading axis of micro-batches. The
        buffers of `state` are donated: use the returned one.

    Example:
        >>> import optax, jax.numpy as jnp
        >>> def loss(w, _, batch, key):
        ...     return jnp.sum((batch["x"] * w["w"] - 1.0) ** 2), jnp.float32(batch["x"].size)
        >>> tx = optax.sgd(0.25)
        >>> state = init_state({"w": jnp.zeros(())}, tx, seed=0)
        >>> state, metrics = make_step(loss, tx)(state, None, {"x": jnp.ones((1, 4))})
        >>> float(state.trainable["w"]), float(metrics.loss)
        (0.5, 1.0)
    """

    def total(trainable, frozen, batch, key):
        loss, weight = loss_fn(trainable, frozen, batch, key)
        return loss, weight

    grad = jax.value_and_grad(total, has_aux=True)

    def step(state: State, frozen, batches):
        key, *keys = _split(state.rng, _leading(batches))
        (loss, weight), grads = _accumulate(grad, state.trainable, frozen, batches, keys)
        per_token = 1.0 / jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g * per_token.astype(g.dtype), grads)
        # Optax raises Python floats to integer counts, which strict dtype promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = State(
            state.step + 1,
            optax.apply_updates(state.trainable, updates),
            opt_state,
            jax.tree.map(_largest, state.receipts, grads),
            jax.random.key_data(key),
        )
        return new, Metrics(loss * per_token, weight, optax.tree.norm(grads))

    return jax.jit(step, donate_argnums=0)


def _leading(batches: Any) -> int:
    return jax.tree.leaves(batches)[0].shape[0]


def _split(rng, n: int):
    return list(jax.random.split(jax.random.wrap_key_data(rng), n + 1))


def _accumulate(grad, trainable, frozen, batches, keys):
    first = jax.tree.map(lambda x: x[0], batches)
    out = grad(trainable, frozen, first, keys[0])
    if len(keys) == 1:
        return out
    rest = jax.tree.map(lambda x: x[1:], batches)

    def add(carry, xs):
        batch, key = xs
        return jax.tree.map(jnp.add, carry, grad(trainable, frozen, batch, key)), None

    return jax.lax.scan(add, out, (rest, jnp.stack(keys[1:])))[0]


def _largest(seen, g):
    axes = tuple(range(seen.ndim, g.ndim))
    return jnp.maximum(seen, jnp.max(jnp.abs(g), axis=axes).astype(jnp.float32))
