"""State in host memory: where its arrays lie, and that nothing else changes. The CPU has `pinned_host` too."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax.errors import LoraxError
from lorax.optim import adamw8bit, offload, offloadable
from lorax.optim import offload as offload_function
from lorax.optim.offload import Folded, _to_device, _to_host
from lorax.train.checkpoint import Checkpoints
from lorax.train.step import init_state, make_step

pytestmark = pytest.mark.optimised


def tree(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(a, (96, 131)), "none": None, "b": jax.random.normal(b, (7,))}


def kinds(state):
    """Bytes of a state by kind of memory."""
    out = {}
    for x in jax.tree.leaves(state):
        out[x.sharding.memory_kind] = out.get(x.sharding.memory_kind, 0) + x.nbytes
    return out


TRANSFORMATIONS = {"adamw": optax.adamw(1e-2), "adamw8bit": adamw8bit(1e-2), "momentum": optax.sgd(0.1, 0.9)}


def test_this_platform_has_it():
    assert offloadable()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_same_updates_and_the_state_on_the_host(name, compiled):
    plain = TRANSFORMATIONS[name]
    moved_away = offload(plain)
    params = tree()
    one, two = plain.init(params), (jax.jit(moved_away.init) if compiled else moved_away.init)(params)
    run = jax.jit if compiled else lambda f: f
    first, second = run(plain.update), run(moved_away.update)
    for seed in range(3):
        with jax.numpy_dtype_promotion("standard"):
            a, one = first(tree(seed), one, params)
            b, two = second(tree(seed), two, params)
        assert kinds(two)["pinned_host"] >= 96 * 131
        here = [x.nbytes for x in jax.tree.leaves(two) if x.sharding.memory_kind == "device"]
        assert all(size < 4096 for size in here)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(b)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, one, _to_device(two))


FOLDS = {
    (96, 128): (24, 4, 128),
    (32, 1, 256): (8, 4, 1, 256),
    (3, 64, 128, 1): (3, 16, 4, 128, 1),
    (48, 256): None,
    (96, 129): None,
    (8192,): None,
    (1, 8192): None,
}


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
@pytest.mark.parametrize("shape", FOLDS)
def test_bytes_of_a_shape_that_tpus_refuse_wait_folded(shape, dtype):
    x = jnp.asarray(np.random.default_rng().integers(0, 100, shape), dtype)
    for way in (_to_host, jax.jit(_to_host)):
        there = way({"x": x})["x"]
        kept = there.array if isinstance(there, Folded) else there
        assert kept.shape == (FOLDS[shape] or shape)
        assert isinstance(there, Folded) == (FOLDS[shape] is not None)
        assert (kept.sharding.memory_kind, kept.nbytes, kept.dtype) == ("pinned_host", x.nbytes, dtype)
        back = _to_device({"x": there})["x"]
        assert back.sharding.memory_kind == "device"
        np.testing.assert_array_equal(back, x)


def test_donated_state_is_reused_and_stays():
    tx = offload(adamw8bit(1e-2))
    params = tree()
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)
    old = state[0].mu["w"].codes
    _, state = update(tree(1), state, params)
    assert old.is_deleted()
    assert kinds(state)["pinned_host"] >= 2 * 96 * 131


def test_sharding_is_kept():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("a"))
    params = jax.device_put(jax.random.normal(jax.random.key(0), (96, 256)), spread)
    tx = offload(adamw8bit(1e-2))
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    assert state[0].mu.codes.array.sharding == spread.with_memory_kind("pinned_host")


def test_inside_a_loop_of_steps():
    tx = offload(optax.adamw(1e-2))
    plain = optax.adamw(1e-2)

    def steps(tx, params):
        def one(carry, seed):
            params, state = carry
            moved, state = tx.update(jax.tree.map(lambda x: jnp.sin(x + seed), params), state, params)
            return (optax.apply_updates(params, moved), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(4.0))[0]

    with jax.numpy_dtype_promotion("standard"):
        params, state = jax.jit(lambda p: steps(tx, p))(tree())
        want, _ = jax.jit(lambda p: steps(plain, p))(tree())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, want)
    assert kinds(state)["pinned_host"] >= 8 * 96 * 131


def test_with_lorax_optimizer_and_a_checkpoint(tmp_path):
    adapted = lorax.adapt(jax.random.key(0), {"up": jnp.ones((300, 200))}, lorax.LoraSpec(targets="up", rank=16))
    trainable, _ = lorax.split(adapted)
    tx = lorax.optimizer(offload(adamw8bit(1e-2)), adapted)
    update = jax.jit(tx.update)
    begun = init_state(trainable, tx, seed=0)
    gradient = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), trainable)
    _, state = update(gradient, begun.opt_state, trainable)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(begun._replace(opt_state=state, step=jnp.int32(1)), {})
    restored = store.restore(begun)
    assert restored is not None
    assert kinds(restored.state.opt_state)["pinned_host"] == kinds(state)["pinned_host"] > 2 * 300 * 16
    jax.tree.map(
        np.testing.assert_array_equal,
        update(gradient, restored.state.opt_state, trainable),
        update(gradient, state, trainable),
    )


def test_in_the_training_step():
    def loss(trainable, frozen, batch, key):
        return jnp.sum((jnp.tanh(batch["x"] @ trainable["w"]) - frozen) ** 2), jnp.float32(batch["x"].size)

    frozen = jax.random.normal(jax.random.key(1), (131,))
    batch = {"x": jax.random.normal(jax.random.key(2), (2, 5, 96))}
    ends = []
    for tx in (adamw8bit(1e-2), offload(adamw8bit(1e-2))):
        state = init_state({"w": tree()["w"]}, tx, seed=0)
        step = make_step(loss, tx)
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
        ends.append((state, metrics))
    (plain, metrics), (moved, metrics_too) = ends
    moved_here = moved._replace(opt_state=_to_device(moved.opt_state))
    jax.tree.map(np.testing.assert_array_equal, (plain, metrics), (moved_here, metrics_too))
    assert kinds(ends[0][0].opt_state).keys() == {"device"}
    assert kinds(ends[1][0].opt_state)["pinned_host"] == 2 * 96 * 131


def test_a_state_on_the_device_moves_with_the_first_update():
    plain = optax.adamw(1e-2)
    tx = offload(plain)
    params = tree()
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(tx.update)(params, plain.init(params), params)
    assert kinds(state)["pinned_host"] == 8 * 96 * 131


def test_abstract_states_have_the_same_shapes():
    tx = offload(adamw8bit(1e-2))
    shapes = jax.eval_shape(tx.init, tree())
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), shapes, tx.init(tree()))


def test_elsewhere_it_is_the_transformation_and_says_so_once(monkeypatch):
    import sys

    module = sys.modules[offload_function.__module__]
    monkeypatch.setattr(module, "offloadable", lambda kind: False)
    monkeypatch.setattr(module, "_said", set())
    plain = adamw8bit(1e-2)
    with pytest.warns(UserWarning, match="no pinned_host memory; the optimizer state stays on the device") as said:
        tx = offload(plain)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offload(plain)
    state = tx.init(tree())
    assert set(kinds(state)) == {"device"}
    a, b = tx.update(tree(1), state), plain.update(tree(1), state)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_other_memories_are_refused():
    assert not offloadable("a_disk")
    with pytest.raises(LoraxError, match=r"'unpinned_host'.*'pinned_host'"):
        offload(adamw8bit(1e-2), memory_kind="unpinned_host")
