"""Adapters combined, against NumPy on the dense changes; full fine-tunes as adapters, against Eckart and Young."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError
from lorax.combine import dare, ties

BASE = {"stacked": jnp.zeros((2, 7, 9)), "heads": jnp.zeros((5, 3, 4)), "bias": jnp.zeros(9)}


def uses(p):
    """What tells that heads is (in, out, out)."""
    return (
        jnp.einsum("lbd,ldf->lbf", jnp.ones((2, 1, 7)), p["stacked"]),
        jnp.einsum("bd,dhk->bhk", jnp.ones((1, 5)), p["heads"]),
        p["bias"],
    )


def adapter(seed, rank=2, **spec):
    tree = lorax.adapt(jax.random.key(seed), BASE, LoraSpec(targets=("stacked", "heads"), rank=rank, **spec), fn=uses)
    rng = np.random.default_rng(seed)
    trainable, frozen = lorax.split(tree)
    draw = lambda v: jnp.asarray(rng.normal(size=v.shape), jnp.float32)  # noqa: E731
    return lorax.extract(lorax.join(jax.tree.map(draw, trainable), frozen))


def changes(tree):
    merged = lorax.merge(lorax.attach(BASE, tree))
    return {name: np.asarray(merged[name], np.float64) for name in ("stacked", "heads")}


ONE, TWO = adapter(1, 2, alpha=3.0), adapter(2, 3, alpha=5.0)
D1, D2 = changes(ONE), changes(TWO)
SUM = {name: 0.7 * D1[name] - 0.4 * D2[name] for name in D1}


def assert_close(tree, want, tolerance=1e-5):
    for name, got in changes(tree).items():
        np.testing.assert_allclose(got, want[name], atol=tolerance * np.abs(want[name]).max())


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_sums_are_exact(method):
    got = lorax.combine([ONE, TWO], [0.7, -0.4], method=method)
    assert_close(got, SUM)
    assert (got["stacked"].rank, got["heads"].base, got["bias"]) == (5, None, None)


def test_a_sum_has_the_least_rank_that_holds_it_and_svd_the_best_of_a_rank():
    twice = lorax.combine([ONE, ONE], [0.25, 0.75])
    assert twice["stacked"].rank == 2
    assert_close(twice, D1)
    best = lorax.combine([ONE, TWO], [0.7, -0.4], method="svd", rank=4)
    assert best["stacked"].rank == 4
    for i in range(2):
        error = np.linalg.norm(changes(best)["stacked"][i] - SUM["stacked"][i])
        assert error == pytest.approx(np.linalg.svd(SUM["stacked"][i])[1][4], rel=1e-4)
    assert lorax.combine([ONE, TWO, TWO], [1, 1, 1], method="svd")["heads"].rank == 3


def test_ties_trims_elects_and_averages():
    rng = np.random.default_rng(0)
    deltas, weights = rng.normal(size=(3, 7, 9)).astype(np.float32), np.array([1.0, 0.5, 2.0], np.float32)
    want = np.zeros((7, 9))
    trimmed = [
        np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-19], d, 0) * w for d, w in zip(deltas, weights, strict=True)
    ]
    for i, j in np.ndindex(7, 9):
        values = [d[i, j] for d in trimmed]
        sign = np.sign(sum(values))
        agree = [v for v in values if np.sign(v) == sign and v]
        want[i, j] = np.mean(agree) if agree else 0
    np.testing.assert_allclose(ties(jnp.asarray(deltas), jnp.asarray(weights), 0.3), want, atol=1e-6)
    # At full density and rank, one adapter comes back as it was, times its weight.
    alone = lorax.combine([ONE], [2.0], method="ties", density=1.0, rank=5)
    assert_close(alone, {name: 2 * d for name, d in D1.items()})


def test_dare_drops_at_random_and_keeps_the_mean():
    deltas = jnp.ones((2, 60, 50))
    got = np.asarray(dare(jax.random.key(0), deltas, jnp.array([1.0, 10.0]), 0.25))
    assert sorted(set(np.round(got.ravel()).tolist())) == [0, 4, 40, 44]
    assert got.mean() == pytest.approx(11, rel=0.05)
    a, b = (lorax.combine([ONE, TWO], [1, 1], "dare", density=0.5, rank=5, key=jax.random.key(k)) for k in (1, 2))
    assert not np.allclose(changes(a)["stacked"], changes(b)["stacked"], atol=0.1)
    whole = lorax.combine([ONE, TWO], [0.7, -0.4], "dare", density=1.0, rank=5, key=jax.random.key(1))
    assert_close(whole, SUM)


def test_bases_stay_and_weights_that_one_adapter_leaves_alone_count_as_unchanged():
    part = {**ONE, "stacked": None}
    got = lorax.combine([lorax.attach(BASE, part), TWO], [0.7, -0.4])
    assert got["stacked"].base is BASE["stacked"]
    assert got["heads"].base is BASE["heads"]
    assert_close(lorax.extract(got), {"stacked": -0.4 * D2["stacked"], "heads": SUM["heads"]})


def test_what_cannot_be_combined_says_why():
    with pytest.raises(LoraxError, match="choose one of linear, cat, svd, ties, dare"):
        lorax.combine([ONE], [1.0], method="mean")
    with pytest.raises(LoraxError, match="2 adapters and 1 weights"):
        lorax.combine([ONE, TWO], [1.0])
    with pytest.raises(LoraxError, match="draws at random; pass key"):
        lorax.combine([ONE], [1.0], method="dare")
    with pytest.raises(LoraxError, match="is no sum of the base and a change"):
        lorax.combine([adapter(1, variant="dora")], [1.0])
    with pytest.raises(LoraxError, match="bias: was trained as a whole"):
        lorax.combine([adapter(1, train_also="bias")], [1.0])
    with pytest.raises(LoraxError, match="density must be above 0"):
        lorax.combine([ONE], [1.0], method="ties", density=0.0)
    with pytest.raises(LoraxError, match="heads: rank 6 is above"):
        lorax.combine([ONE], [1.0], method="svd", rank=6)


def test_vera_and_lora_fa_combine_with_lora():
    vera, fixed = adapter(3, variant="vera"), adapter(4, variant="lora-fa")
    want = {name: changes(vera)[name] + 2 * changes(fixed)[name] - D1[name] for name in D1}
    assert_close(lorax.combine([vera, fixed, ONE], [1, 2, -1]), want)


def test_a_full_fine_tune_becomes_the_best_adapter_of_its_rank():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    base = {"w": draw(2, 9, 7), "norm": draw(9), "same": draw(4, 4)}
    after = {"w": base["w"] + 0.1 * draw(2, 9, 7), "norm": base["norm"] + 1, "same": base["same"]}
    found = lorax.extract_lora(base, after, rank=3)
    singular = np.linalg.svd(np.asarray(after["w"] - base["w"], np.float64))[1]
    floor = np.sqrt((singular[:, 3:] ** 2).sum() / (singular**2).sum())
    assert found.errors == {"w": pytest.approx(floor, rel=1e-4)}
    merged = lorax.merge(found.adapted)
    gone = np.linalg.norm(merged["w"] - after["w"]) / np.linalg.norm(after["w"] - base["w"])
    assert gone == pytest.approx(floor, rel=1e-4)
    np.testing.assert_array_equal(merged["norm"], after["norm"])
    assert found.adapted["same"] is base["same"]
    assert lorax.extract_lora(base, after, rank=99).errors["w"] < 1e-5
    with pytest.raises(LoraxError, match="w: the fine-tuned tree has"):
        lorax.extract_lora(base, {**after, "w": draw(2, 9, 8)})
    with pytest.raises(LoraxError, match="near misses"):
        lorax.extract_lora(base, after, targets="kernel")


def test_a_change_that_started_in_the_weight_goes_over_the_original_one():
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(2, 9, 7)), jnp.float32)}
    for variant in ("lora", "dora", "lora-fa"):
        spec = LoraSpec(targets="w", rank=2, init="pissa", variant=variant)
        start = lorax.adapt(jax.random.key(0), base, spec)
        trainable, frozen = lorax.split(start)
        trained = lorax.join(jax.tree.map(lambda v: 1.1 * v + 0.3, trainable), frozen)
        moved = lorax.rebase(trained, lorax.extract(start), base)
        assert moved["w"].rank == 4
        assert moved["w"].base is base["w"]
        np.testing.assert_allclose(lorax.merge(moved)["w"], lorax.merge(trained)["w"], atol=1e-5)
    # Twice a rank of 4 is more than 7 allow; nothing is lost.
    start = lorax.adapt(jax.random.key(0), base, LoraSpec(targets="w", rank=4, init="milora"))
    trained = {
        "w": type(start["w"])(start["w"].base, start["w"].A + 1, start["w"].B * 2, start["w"].scale, start["w"].axes)
    }
    moved = lorax.rebase(trained, start, base)
    assert moved["w"].rank == 7
    np.testing.assert_allclose(lorax.merge(moved)["w"], lorax.merge(trained)["w"], atol=1e-4)
    with pytest.raises(LoraxError, match="w: is not changed in the same way"):
        lorax.rebase(trained, {}, base)
