"""Training against mathematics: what low-rank regression must reach, where it must stop, and what must not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import LoraSpec

INS, OUTS, TRUE_RANK, STEPS = 12, 9, 3, 4000
rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(INS, OUTS)), jnp.float32)
CHANGE = jnp.asarray(rng.normal(size=(INS, TRUE_RANK)) @ rng.normal(size=(TRUE_RANK, OUTS)), jnp.float32)
# Orthonormal inputs: the loss is the squared distance of the change from the true one.
X = jnp.asarray(np.linalg.qr(rng.normal(size=(INS, INS)))[0], jnp.float32)


def fitted(tree, tx, steps):
    """The loss curve of Adam on ||X (W + s A B) - X (W + D)||_F^2, in one scan."""
    trainable, frozen = lorax.split(tree)
    target = X @ (W + CHANGE)

    def loss(trainable):
        return jnp.sum((lorax.lift(lambda p: X @ p["w"])(lorax.join(trainable, frozen)) - target) ** 2)

    def step(carry, _):
        trainable, state = carry
        value, grad = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grad, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    run = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=steps))
    (last, _), curve = run(trainable)
    return np.append(np.asarray(curve, np.float64), float(loss(last)))


def adapted(rank, **spec):
    return lorax.adapt(jax.random.key(1), {"w": W}, LoraSpec(targets="w", rank=rank, alpha=float(rank), **spec))


@pytest.mark.parametrize("rank", [TRUE_RANK, 5])
def test_regression_onto_a_change_of_rank_k_reaches_it_with_as_much_rank(rank):
    tx = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))
    curve = fitted(adapted(rank), tx, STEPS)
    assert curve[0] == pytest.approx(float(jnp.sum(CHANGE**2)), rel=1e-4)
    assert curve[-1] <= 1e-6 * curve[0]


@pytest.mark.parametrize("rank", [1, 2])
def test_regression_with_less_rank_stops_at_what_eckart_and_young_allow(rank):
    tx = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))
    floor = float((np.linalg.svd(np.asarray(CHANGE, np.float64))[1][rank:] ** 2).sum())
    assert floor > 1
    assert fitted(adapted(rank), tx, STEPS)[-1] == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize(("p", "q"), [(4.0, 2.0), (0.5, 8.0)])
def test_scales_that_cancel_change_nothing_under_adam(p, q):
    """(alpha, A, rate of A, rate of B) -> (alpha / pq, p A, p rate, q rate): the same curve, bit for bit."""
    one = adapted(3)
    leaf = one["w"]
    two = {"w": type(leaf)(leaf.base, leaf.A * p, leaf.B * q, leaf.scale / (p * q), leaf.axes)}
    # Adam's epsilon is the one thing that has a scale.
    adam = lambda rate: optax.adam(rate, eps=1e-30)  # noqa: E731
    plain = fitted(one, lorax.lora_plus(adam(0.01), 1.0), 300)
    scaled = fitted(two, lorax.lora_plus(adam(0.01 * p), q / p), 300)
    assert plain[-1] < 0.5 * plain[0]
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    # The check can fail: one rate left as it was is another curve.
    other = fitted(two, lorax.lora_plus(adam(0.01 * p), 1.0), 300)
    assert np.abs(other / plain - 1).max() > 0.01
