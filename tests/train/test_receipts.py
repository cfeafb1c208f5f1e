"""Training that does not reach a target is found out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lorax
from lorax.train.receipts import coverage, unmoved
from lorax.train.step import init_state, make_step


def train(loss, params, steps=3, lr=0.1):
    spec = lorax.LoraSpec(targets=("*/w", "v"), rank=2)
    trainable, frozen = lorax.split(lorax.adapt(jax.random.key(0), params, spec))
    tx = optax.sgd(lr)
    state = init_state(trainable, tx, 0)
    step = make_step(lambda t, f, batch, key: loss(lorax.join(t, f), batch), tx)
    for _ in range(steps):
        state, _ = step(state, frozen, {"x": jnp.ones((1, 4, 5))})
    return coverage(state)


PARAMS = {"a": {"w": jnp.ones((3, 5, 5))}, "v": jnp.ones((5, 6))}


@lorax.lift
def uses_all(params, batch):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["a"]["w"])
    return jnp.sum(jnp.square(x @ params["v"])), jnp.float32(4)


@lorax.lift
def forgets_v(params, batch):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["a"]["w"])
    return jnp.sum(x), jnp.float32(4)


@lorax.lift
def stops_below_the_last_layer(params, batch):
    def layer(x, w):
        return jnp.tanh(jax.lax.stop_gradient(x) @ w), None

    x, _ = jax.lax.scan(layer, batch["x"], params["a"]["w"])
    return jnp.sum(jnp.square(x @ params["v"])), jnp.float32(4)


def test_every_target_moved():
    receipts = train(uses_all, PARAMS)
    assert {r.target for r in receipts} == {"a/w/B", "v/B"}
    assert all(r.moved and r.largest > 0 and r.gradient > 0 for r in receipts)
    assert next(r for r in receipts if r.target == "a/w/B").layers == (3, 3)
    assert unmoved(receipts) is None


def test_a_target_that_the_loss_forgets_is_named():
    fault = unmoved(train(forgets_v, PARAMS))
    assert fault.startswith("v/B: never moved")


def test_a_layer_without_a_gradient_is_counted():
    fault = unmoved(train(stops_below_the_last_layer, PARAMS))
    assert "a/w/B: never moved in 2 of 3 layers" in fault


def test_a_rate_of_zero_is_found_at_b():
    receipts = train(uses_all, PARAMS, lr=0.0)
    assert all(r.gradient > 0 and r.largest == 0.0 for r in receipts)
    assert "(and 1 more targets)" in unmoved(receipts)


def test_what_trains_whole_is_judged_by_its_gradient():
    spec = lorax.LoraSpec(targets=(), train_also="*")
    trainable, frozen = lorax.split(lorax.adapt(jax.random.key(0), PARAMS, spec))
    state = init_state(trainable, optax.sgd(0.1), 0)
    step = make_step(lambda t, f, b, key: forgets_v(lorax.join(t, f), b), optax.sgd(0.1))
    state, _ = step(state, frozen, {"x": jnp.ones((1, 4, 5))})
    assert unmoved(coverage(state)).startswith("v/value: never moved")


@pytest.mark.parametrize("name", ["moved", "layers", "target"])
def test_receipts_are_plain_json(name):
    assert name in train(uses_all, PARAMS)[0].as_json()
