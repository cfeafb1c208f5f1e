"""Trees apart and together: exact round trips, and errors that name the first mismatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import LoraSpec, LoraxError
from lorax.tree import named_leaves, train_last

KEY = jax.random.key(0)


def base(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), dtype)  # noqa: E731
    return {"layers": {"q": {"kernel": draw(4, 5, 7)}, "norm": {"scale": draw(4, 5)}}, "out": (draw(7, 3), draw(3))}


def adapted(dtype=jnp.float32):
    spec = LoraSpec(targets="*/q/*", rank=3, train_also="out/1")
    tree = lorax.adapt(KEY, base(dtype), spec)
    trainable, frozen = lorax.split(tree)
    return lorax.join(jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), trainable), frozen)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("make", [adapted, lambda: train_last(base(), 2), base], ids=["low-rank", "pieces", "plain"])
def test_split_and_join(make):
    tree = make()
    trainable, frozen = lorax.split(tree)
    assert_same(lorax.join(trainable, frozen), tree)
    n = len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen))
    assert n == len(jax.tree.leaves(tree))
    # Halves of a half are stable: the optimizer sees the trainable half as well as the whole.
    assert_same(lorax.split(trainable)[0], trainable)
    assert jax.tree.leaves(lorax.split(trainable)[1]) == []


def test_join_refuses_what_are_no_halves():
    trainable, frozen = lorax.split(adapted())
    with pytest.raises(LoraxError, match="layers/q/kernel/A has a value on both sides"):
        lorax.join(trainable, adapted())
    with pytest.raises(LoraxError, match="different structures"):
        lorax.join(trainable["layers"], frozen)


def test_merging_factors_of_16_bits_rounds_nothing_in_between():
    tree = lorax.adapt(KEY, base(), LoraSpec(targets="*/q/*", rank=3, dtype=jnp.bfloat16))
    trainable, frozen = lorax.split(tree)
    tree = lorax.join(jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), trainable), frozen)
    merged, errors = lorax.merge(tree, audit=True)
    assert merged["layers"]["q"]["kernel"].dtype == jnp.float32
    assert max(errors.values()) < 1e-6
    back = lorax.unmerge(merged, tree)["layers"]["q"]["kernel"]
    np.testing.assert_allclose(back, base()["layers"]["q"]["kernel"], atol=1e-6)


@pytest.mark.optimised
def test_merge_is_the_base_plus_the_change_and_audit_tells_the_rounding():
    tree = adapted()
    leaf = tree["layers"]["q"]["kernel"]
    merged, errors = lorax.merge(tree, audit=True)
    want = np.asarray(leaf.base, np.float64) + float(leaf.scale) * (
        np.asarray(leaf.A, np.float64) @ np.asarray(leaf.B, np.float64)
    )
    np.testing.assert_allclose(merged["layers"]["q"]["kernel"], want, rtol=1e-6)
    assert set(errors) == {"layers/q/kernel"}
    assert 0 < errors["layers/q/kernel"] < 1e-6
    _, coarse = lorax.merge(adapted(jnp.bfloat16), audit=True)
    assert 1e-4 < coarse["layers/q/kernel"] < 1e-2
    assert jax.tree.structure(merged) == jax.tree.structure(base())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_unmerge_returns_to_the_base(dtype, tolerance):
    spec = LoraSpec(targets="*/q/*", rank=3)
    tree = lorax.adapt(KEY, base(dtype), spec)
    trainable, frozen = lorax.split(tree)
    tree = lorax.join(jax.tree.map(lambda x: x + 0.3, trainable), frozen)
    back = lorax.unmerge(lorax.merge(tree), lorax.extract(tree))
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(base(dtype)), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=tolerance)


def test_unmerge_refuses_weights_that_were_replaced():
    with pytest.raises(LoraxError, match="out/1: was trained as a whole"):
        lorax.unmerge(lorax.merge(adapted()), adapted())


def test_extract_holds_no_base_and_attach_puts_it_back():
    tree = adapted()
    adapter = lorax.extract(tree)
    held = sum(x.size for x in jax.tree.leaves(adapter))
    assert held == 4 * 3 * (5 + 7) + 3 + 1  # factors, the bias, the scale
    assert_same(lorax.attach(base(), adapter), tree)
    with pytest.raises(LoraxError, match="layers/q/kernel: an adapter without its base"):
        lorax.merge(adapter)
    last = train_last(base()["layers"], 1, "*")
    assert_same(lorax.attach(base()["layers"], lorax.extract(last)), last)


def test_attach_names_the_first_mismatch():
    adapter = lorax.extract(adapted())
    other = base()
    other["layers"]["q"]["kernel"] = jnp.ones((4, 5, 8))
    with pytest.raises(LoraxError, match=r"layers/q/kernel: the adapter is for shape \(4, 5, 7\).*another base"):
        lorax.attach(other, adapter)
    del other["layers"]["q"]
    with pytest.raises(LoraxError, match=r"layers/q/kernel: .*the base has none there"):
        lorax.attach(other, adapter)


def test_mask_and_optimizer_hold_state_for_what_trains_alone():
    tree = adapted()
    flags = lorax.mask(tree)
    assert jax.tree.structure(flags) == jax.tree.structure(tree)
    trainable, _ = lorax.split(tree)
    count = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x, f in zip(jax.tree.leaves(tree), jax.tree.leaves(flags), strict=True) if f) == count
    for given in (tree, trainable):
        state = lorax.optimizer(optax.adam(1e-3), tree).init(given)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * 4 * count + 4  # two moments and a step count


def test_optimizer_moves_what_trains_and_nothing_else():
    tree = adapted()
    tx = lorax.optimizer(optax.adamw(1e-2, weight_decay=0.1), tree)
    gradient = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(gradient, tx.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    for old, now, trains in zip(*map(jax.tree.leaves, (tree, new, lorax.mask(tree))), strict=True):
        assert bool((old == now).all()) != trains
    with pytest.raises(LoraxError, match="nothing in this tree trains"):
        lorax.optimizer(optax.sgd(1.0), base())


def test_optax_masked_takes_the_mask():
    tree = adapted()
    tx = optax.masked(optax.sgd(1.0), lorax.mask(tree))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    assert float(updates["layers"]["q"]["kernel"].A.max()) == -1.0


def test_report_counts():
    rows = lorax.report(adapted())
    assert rows.trainable == 4 * 3 * (5 + 7) + 3
    assert rows.frozen == 4 * 5 * 7 + 4 * 5 + 7 * 3
    assert rows.matched == ("layers/q/kernel", "out/1")
    assert "low-rank" in str(rows)
    assert "147" in str(rows)
    assert rows.groups()["layers/q"] == (144, 140)


def test_trees_pass_through_jit_and_vmap():
    tree = adapted()
    assert_same(jax.jit(lambda t: t)(tree), tree)
    doubled = jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    assert dict(named_leaves(jax.vmap(lambda t: t)(doubled)))["layers/q/kernel"].A.shape == (2, 4, 5, 3)
