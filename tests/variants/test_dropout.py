"""Dropout on the low-rank path: which inputs it hides, from whom, how often, and with which mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, lift

KEY = jax.random.key(0)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def adapted(params, **spec):
    tree = lorax.adapt(KEY, params, LoraSpec(targets="*", rank=2, **spec))
    trainable, frozen = lorax.split(tree)
    return lorax.join(jax.tree.map(lambda v: v + draw(*v.shape), trainable), frozen)


def test_inputs_are_dropped_at_the_rate_on_the_low_rank_path_alone():
    # With a unit matrix for input, row i of the change is kept whole (over 1 - p) or gone.
    params = {"w": draw(400, 3)}
    tree = adapted(params, dropout=0.25)
    fn = lambda p: jnp.eye(400) @ p["w"]  # noqa: E731
    change = lift(fn)(lorax.dropout(tree, jax.random.key(5))) - params["w"]
    whole = lorax.merge(tree)["w"] - params["w"]
    ratio = np.asarray(jnp.sum(change * whole, axis=1) / jnp.sum(whole * whole, axis=1))
    gone = np.abs(ratio) < 1e-4
    np.testing.assert_allclose(ratio[~gone], 1 / 0.75, rtol=1e-3)
    assert gone.mean() == pytest.approx(0.25, abs=0.08)
    # Without a key, nothing is dropped; another key is another mask; the same is the same.
    np.testing.assert_allclose(lift(fn)(tree) - params["w"], whole, atol=1e-4)
    other = lift(fn)(lorax.dropout(tree, jax.random.key(6))) - params["w"]
    assert not np.allclose(other, change)
    np.testing.assert_array_equal(lift(fn)(lorax.dropout(tree, jax.random.key(5))) - params["w"], change)


def test_each_layer_has_a_mask_of_its_own_and_gradients_see_it():
    params = {"w": jnp.zeros((3, 60, 60))}
    tree = adapted(params, dropout=0.5)

    def layers(p, x):
        return jax.lax.scan(lambda c, w: (c, jax.checkpoint(lambda w: c @ w)(w)), x, p["w"])[1]

    out = lift(layers)(lorax.dropout(tree, KEY), jnp.eye(60))
    gone = np.abs(np.asarray(out)).max(axis=-1) < 1e-6
    assert gone.shape == (3, 60)
    assert not (gone[0] == gone[1]).all()
    grad = jax.grad(lambda t: jnp.sum(lift(layers)(lorax.dropout(t, KEY), jnp.eye(60))))(tree)
    np.testing.assert_array_equal(np.abs(np.asarray(grad["w"].A)).max(axis=-1) == 0, gone)


@pytest.mark.parametrize("variant", ["dora", "vera", "lora-fa"])
def test_variants_drop_too_and_keep_their_kind(variant):
    params = {"w": draw(9, 6)}
    tree = adapted(params, dropout=0.5, variant=variant)
    x = draw(40, 9)
    fn = lambda p: x @ p["w"]  # noqa: E731
    steps = jnp.stack([lift(fn)(lorax.dropout(tree, jax.random.key(i))) for i in range(3)])
    assert float(jnp.abs(steps[0] - steps[1]).max()) > 0.1
    assert float(jnp.abs(lift(fn)(tree) - fn(lorax.merge(tree))).max()) < 1e-3
    # The mean over masks is the change itself: 400 of them in one program.
    mean = jax.vmap(lambda key: lift(fn)(lorax.dropout(tree, key)))(jax.random.split(KEY, 400)).mean(axis=0)
    error = jnp.linalg.norm(mean - fn(lorax.merge(tree))) / jnp.linalg.norm(fn(lorax.merge(tree)) - fn(params))
    assert float(error) < 0.15


def test_convolutions_and_ragged_products_drop_and_custom_derivatives_are_refused():
    params = {"w": draw(3, 4, 5)}
    tree = lorax.adapt(KEY, params, LoraSpec(targets="*", rank=2, dropout=0.5))
    moved = {"w": type(tree["w"])(tree["w"].base, tree["w"].A, draw(3, 2, 5), jnp.float32(1), tree["w"].axes, 0.5)}
    ragged = lambda p: jax.lax.ragged_dot(draw(6, 4), p["w"], jnp.array([1, 2, 3], jnp.int32))  # noqa: E731
    a, b = (lift(ragged)(lorax.dropout(moved, jax.random.key(i))) for i in (1, 2))
    assert float(jnp.abs(a - b).max()) > 0.1

    @jax.custom_vjp
    def own(w):
        return jnp.sum(w)

    own.defvjp(lambda w: (own(w), None), lambda _, ct: (ct * jnp.ones((3, 4, 5)),))
    with pytest.raises(LoraxError, match=r"w: .*with dropout"):
        lift(lambda p: own(p["w"]))(lorax.dropout(moved, KEY))


def test_a_tree_without_rates_comes_back_as_it_is():
    tree = adapted({"w": draw(9, 6)})
    assert lorax.dropout(tree, KEY)["w"] is tree["w"]
