"""The step on a model small enough to write down."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax.train.loop import Diverged, fit, stacked
from lorax.train.step import init_state, make_step


def squares(trainable, frozen, batch, key):
    """A weighted sum of squares and its weight: the batches may hold different numbers of counting rows."""
    y = batch["x"] @ frozen["w"] @ trainable["a"]
    return jnp.sum(jnp.square(y - batch["y"]).sum(-1) * batch["weights"]), jnp.sum(batch["weights"])


def data(n, seed=0):
    rng = np.random.default_rng(seed)
    weights = (rng.random(n) < 0.6).astype(np.float32)
    return {
        "x": rng.normal(size=(n, 5)).astype(np.float32),
        "y": rng.normal(size=(n, 3)).astype(np.float32),
        "weights": weights,
    }


def start(tx):
    rng = np.random.default_rng(1)
    frozen = {"w": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)}
    return init_state({"a": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)}, tx, seed=3), frozen


def test_accumulated_micro_batches_are_one_large_batch():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    whole = data(24)
    parts = jax.tree.map(lambda x: x.reshape(4, 6, *x.shape[1:]), whole)
    step = make_step(squares, tx)
    state, frozen = start(tx)
    one, m1 = step(state, frozen, jax.tree.map(lambda x: x[None], whole))
    state, _ = start(tx)
    four, m4 = step(state, frozen, parts)
    np.testing.assert_allclose(one.trainable["a"], four.trainable["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([m1.loss, m1.grad_norm], [m4.loss, m4.grad_norm], rtol=1e-6)
    assert float(m1.tokens) == float(m4.tokens) == whole["weights"].sum()


def test_a_step_is_the_optimizer_on_the_mean_gradient():
    tx = optax.sgd(0.5)
    state, frozen = start(tx)
    a = np.asarray(state.trainable["a"])
    batch = data(9)

    def mean(a):
        total, weight = squares({"a": a}, frozen, batch, None)
        return total / weight

    want = a - 0.5 * np.asarray(jax.grad(mean)(jnp.asarray(a)))
    new, metrics = make_step(squares, tx)(state, frozen, jax.tree.map(lambda x: x[None], batch))
    np.testing.assert_allclose(new.trainable["a"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, mean(jnp.asarray(a)), rtol=1e-6)
    assert int(new.step) == 1


def test_the_callers_arrays_survive_donation():
    tx = optax.sgd(0.5)
    mine = {"a": jnp.ones((7, 3))}
    _, frozen = start(tx)
    state = init_state(mine, tx, 0)
    make_step(squares, tx)(state, frozen, jax.tree.map(lambda x: x[None], data(4)))
    np.testing.assert_array_equal(mine["a"], np.ones((7, 3)))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.trainable["a"])


def test_receipts_keep_the_largest_gradient_of_each_layer():
    def loss(trainable, frozen, batch, key):
        return jnp.sum(trainable["w"][1] * batch["g"]), jnp.float32(1)

    tx = optax.sgd(0.0)
    state = init_state({"w": jnp.zeros((3, 2, 2))}, tx, 0)
    step = make_step(loss, tx)
    for g in (2.0, -5.0, 1.0):
        state, _ = step(state, None, {"g": jnp.full((1, 2, 2), g)})
    np.testing.assert_array_equal(state.receipts["w"], [0.0, 5.0, 0.0])


def test_the_random_key_advances_and_follows_the_seed():
    def loss(trainable, frozen, batch, key):
        return trainable["w"] * jax.random.uniform(key), jnp.float32(1)

    def run(seed):
        tx = optax.sgd(1.0)
        state, step, seen = init_state({"w": jnp.float32(0)}, tx, seed), make_step(loss, tx), []
        for _ in range(3):
            state, metrics = step(state, None, {"x": jnp.zeros((1, 1))})
            seen.append(float(metrics.grad_norm))
        return seen

    assert run(0) == run(0)
    assert len(set(run(0))) == 3
    assert run(0) != run(1)


def test_fit_stops_at_the_first_step_that_is_no_number():
    tx = optax.sgd(0.1)
    state, frozen = start(tx)
    batches = [data(4, seed) | {"ids": np.zeros((4, 5)), "segment_ids": np.ones((4, 5))} for seed in range(5)]
    for batch in batches:  # every field of a batch is (rows, width)
        batch["weights"] = np.pad(batch["weights"][:, None], [(0, 0), (0, 4)])
        batch["y"] = np.pad(batch["y"], [(0, 0), (0, 2)])
    batches[2]["y"][:] = np.inf
    batches[2]["weights"][:, 0] = 1
    rows = []

    def per_row(trainable, frozen, batch, key):
        y = batch["x"] @ frozen["w"] @ trainable["a"]
        error = jnp.square(y - batch["y"][:, :3]).sum(-1)
        return jnp.sum(error * batch["weights"][:, 0]), jnp.sum(batch["weights"])

    with pytest.raises(Diverged, match="step 3"):
        fit(
            make_step(per_row, tx),
            state,
            frozen,
            iter(batches),
            steps=5,
            rate=lambda i: jnp.float32(0.1),
            after=lambda _, row: rows.append(row.step),
        )
    assert rows == [1, 2]


def test_stacking_pads_the_shorter_batch_with_nothing():
    a = {"ids": np.full((2, 3), 5), "weights": np.ones((2, 3), np.float32)}
    b = {"ids": np.full((2, 5), 6), "weights": np.ones((2, 5), np.float32)}
    both = stacked([a, b])
    assert both["ids"].shape == (2, 2, 5)
    assert both["weights"].sum() == 16
    assert not both["ids"][0, :, 3:].any()
