"""Where the factors start: each start's equation against NumPy in float64, and the way back to the weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, linalg
from lorax.lift.inputs import second_moments
from lorax.tree import named_leaves
from lorax.variants.eva import redistribute
from lorax.weights import Axes

KEY = jax.random.key(0)
RANK = 3
MOVING = ("pissa", "pissa-fast", "milora", "milora-fast", "olora")


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


PARAMS = {
    "stacked": jnp.asarray(draw(2, 23, 17)),
    "wide": jnp.asarray(draw(17, 31)),
    "heads": jnp.asarray(draw(2, 9, 13)),
}


@pytest.fixture(scope="module")
def trees():
    return {init: lorax.adapt(KEY, PARAMS, LoraSpec(targets="*", rank=RANK, alpha=12.0, init=init)) for init in MOVING}


def matrices(leaf):
    """(A, B, base) of every matrix of a leaf, in float64."""
    rows = [np.asarray(x, np.float64) for x in (leaf.A, leaf.B, leaf.base)]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in rows]
    return zip(*flat, strict=True)


@pytest.mark.parametrize("init", MOVING)
def test_merge_right_after_adapt_gives_the_weights_back(trees, init):
    for name, leaf in trees[init].items():
        moved = np.abs(np.asarray(leaf.base) - np.asarray(PARAMS[name])).max()
        # The minor part of a full-rank weight is small, and is no rounding error.
        assert moved > 1e-3
        merged = np.asarray(lorax.merge(trees[init])[name])
        np.testing.assert_allclose(merged, PARAMS[name], rtol=0, atol=1e-6 * np.abs(PARAMS[name]).max())


@pytest.mark.parametrize(("init", "tolerance"), [("pissa", 1e-5), ("pissa-fast", 1e-2)])
def test_pissa_takes_the_principal_part(trees, init, tolerance):
    for leaf in trees[init].values():
        for a, b, base in matrices(leaf):
            weight = base + 4.0 * a @ b
            u, s, v = np.linalg.svd(weight)
            want = u[:, :RANK] * s[:RANK] @ v[:RANK]
            assert np.linalg.norm(4.0 * a @ b - want) <= tolerance * np.linalg.norm(want)
            # The singular values are shared equally, and the rest is orthogonal to what was taken.
            np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)
            np.testing.assert_allclose(np.linalg.svd(base)[1][0], s[RANK], rtol=2 * tolerance)


@pytest.mark.parametrize(("init", "tolerance"), [("milora", 1e-4), ("milora-fast", 3e-2)])
def test_milora_takes_the_minor_part(trees, init, tolerance):
    for leaf in trees[init].values():
        for a, b, base in matrices(leaf):
            weight = base + 4.0 * a @ b
            s = np.linalg.svd(weight)[1]
            np.testing.assert_allclose(np.linalg.svd(4.0 * a @ b)[1][:RANK], s[-RANK:], rtol=tolerance)
            rest = np.linalg.svd(base)[1]
            np.testing.assert_allclose(rest[: len(s) - RANK], s[:-RANK], rtol=tolerance)
            assert rest[-1] < 0.1 * s[-RANK]


def test_olora_takes_the_first_part_of_a_qr(trees):
    for leaf in trees["olora"].values():
        for a, b, base in matrices(leaf):
            np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)
            weight = base + 4.0 * a @ b
            q = np.linalg.qr(weight.T)[0][:, :RANK]
            np.testing.assert_allclose(np.abs(b), np.abs(q.T), atol=1e-4)
            # A is scaled back, so that scale A B = R^T Q^T.
            np.testing.assert_allclose(4.0 * a @ b, weight @ q @ q.T, atol=1e-4)


def test_a_start_that_moves_the_base_meets_bfloat16_and_dora_and_abstract_trees():
    half = {"w": jnp.asarray(draw(31, 17), jnp.bfloat16)}
    leaf = lorax.adapt(KEY, half, LoraSpec(targets="w", rank=2, init="pissa"))["w"]
    assert (leaf.base.dtype, leaf.A.dtype) == (jnp.bfloat16, jnp.float32)
    back = np.asarray(lorax.merge({"w": leaf})["w"], np.float32)
    np.testing.assert_allclose(back, np.asarray(half["w"], np.float32), rtol=2**-7, atol=2**-8)
    spec = LoraSpec(targets="wide", rank=2, init="pissa", variant="dora")
    dora = lorax.adapt(KEY, PARAMS, spec)["wide"]
    np.testing.assert_allclose(dora.magnitude, np.linalg.norm(PARAMS["wide"], axis=0), rtol=1e-5)
    np.testing.assert_allclose(lorax.merge({"w": dora})["w"], PARAMS["wide"], atol=5e-6)
    abstract = lorax.adapt(KEY, jax.eval_shape(lambda: PARAMS), spec)["wide"]
    assert abstract.base.shape == (17, 31)


def test_starts_refuse_what_they_cannot_do():
    packed = lorax.quantize({"w": jnp.asarray(draw(64, 8))}, targets="w")
    with pytest.raises(LoraxError, match="w: is quantised, and init='pissa'"):
        lorax.adapt(KEY, packed, LoraSpec(targets="w", rank=2, init="pissa"))
    with pytest.raises(LoraxError, match="alpha is 0"):
        lorax.adapt(KEY, PARAMS, LoraSpec(targets="wide", rank=2, alpha=0.0, init="olora"))
    with pytest.raises(LoraxError, match="pass fn and args"):
        lorax.adapt(KEY, PARAMS, LoraSpec(targets="wide", rank=2, init="eva"))
    with pytest.raises(LoraxError, match="heads: no product of the example brings inputs"):
        second_moments(lambda p, x: jnp.sum(p["heads"]) * x, PARAMS, (jnp.ones(()),), {"heads": Axes((), (0, 1), (2,))})


EVA = {"stacked": jnp.asarray(draw(2, 18, 18)), "heads": jnp.asarray(draw(2, 9, 13)), "wide": jnp.asarray(draw(13, 31))}


def test_eva_starts_at_the_directions_of_the_inputs():
    x = jnp.asarray(draw(40, 18) * np.linspace(3, 0.1, 18, dtype=np.float32))

    def fn(params, x):
        y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["stacked"])
        return jnp.einsum("bhk,hkd->bd", y.reshape(-1, 2, 9), params["heads"]) @ params["wide"]

    spec = LoraSpec(targets="*", rank=RANK, init="eva")
    tree = lorax.adapt(KEY, EVA, spec, fn=fn, args=(x,))
    first = np.tanh(np.asarray(x) @ EVA["stacked"][0])
    last = np.tanh(first @ np.asarray(EVA["stacked"][1]))
    inner = last @ np.asarray(EVA["heads"]).reshape(18, 13)
    seen = {"stacked": [np.asarray(x), first], "heads": [last], "wide": [inner]}
    ranks = {}
    for name, leaf in tree.items():
        assert not np.asarray(leaf.B).any()
        a = np.asarray(leaf.A, np.float64).reshape(len(seen[name]), -1, leaf.rank)
        for i, inputs in enumerate(seen[name]):
            used = int((np.abs(a[i]).max(axis=0) > 0).sum())
            _, s, v = np.linalg.svd(inputs.astype(np.float64), full_matrices=False)
            # The same subspace: directions of nearly equal variance may mix.
            overlap = np.linalg.norm(v[:used] @ a[i][:, :used]) ** 2
            assert overlap == pytest.approx(used, abs=0.05)
            np.testing.assert_allclose(a[i][:, :used].T @ a[i][:, :used], np.eye(used), atol=1e-4)
            ranks[name, i] = (used, s**2 / (s**2).sum())
    assert sum(used for used, _ in ranks.values()) == 4 * RANK
    # No component that was left out explains more than one that was taken, but for the limits on one weight.
    taken = min(share[used - 1] for used, share in ranks.values() if used > 1)
    left = max(share[used] for used, share in ranks.values() if used < 2 * RANK)
    assert taken >= left * 0.999
    np.testing.assert_allclose(lorax.lift(fn)(tree, x), fn(EVA, x), rtol=1e-5, atol=1e-5)


def test_inputs_add_up_over_uses_and_stacked_experts():
    params = {"w": jnp.asarray(draw(5, 7)), "experts": jnp.asarray(draw(3, 5, 4))}
    x = jnp.asarray(draw(6, 5))

    def fn(p, x):
        y = jnp.einsum("ebd,edf->ebf", jnp.stack([x, 2 * x, -x]), p["experts"])
        return jnp.tanh(x @ p["w"]).sum() + (3 * x @ p["w"].astype(jnp.float32)).sum() + y.sum()

    axes = {"w": Axes((), (0,), (1,)), "experts": Axes((0,), (1,), (2,))}
    found = second_moments(fn, params, (x,), axes)
    gram = np.asarray(x.T @ x)
    np.testing.assert_allclose(found["w"], 10 * gram, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["experts"], np.stack([gram, 4 * gram, gram]), rtol=1e-5, atol=1e-4)


def test_ranks_go_where_they_explain_most_and_add_up():
    shares = {"a": np.array([[0.5, 0.3, 0.1, 0.05], [0.4, 0.02, 0.01, 0.0]]), "b": np.array([0.2, 0.15, 0.14, 0.13])}
    got = redistribute(shares, {"a": 2, "b": 2})
    assert got["a"].tolist() == [2, 1]
    assert int(got["b"]) == 3
    assert redistribute(shares, {"a": 1, "b": 1})["a"].tolist() == [1, 1]


def test_decompositions_of_stacks_and_of_products():
    w = draw(2, 21, 34)
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    for got, part in (
        (linalg.top(jnp.asarray(w), 4), slice(0, 4)),
        (linalg.bottom(jnp.asarray(w), 4), slice(-4, None)),
        (linalg.top_fast(KEY, jnp.asarray(w), 4, 12), slice(0, 4)),
        (linalg.bottom_fast(KEY, jnp.asarray(w), 4, 12), slice(-4, None)),
    ):
        np.testing.assert_allclose(got.values, s[:, part], rtol=1e-4)
        want = (u[:, :, part] * s[:, None, part]) @ v[:, part]
        np.testing.assert_allclose((got.u * got.values[:, None]) @ got.v, want, atol=2e-3)
    a, b = draw(2, 21, 5), draw(2, 5, 13)
    got = linalg.product(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got.values, np.linalg.svd(a @ b)[1][:, :5], rtol=1e-4)
    np.testing.assert_allclose((got.u * got.values[:, None]) @ got.v, a @ b, atol=1e-4)
    # Without full rank the smallest directions are those that the matrix takes to nothing.
    thin = jnp.asarray(draw(30, 6) @ draw(6, 12))
    nothing = linalg.bottom_fast(KEY, thin, 3)
    assert float(jnp.abs(thin @ nothing.v.T).max()) < 1e-3
    np.testing.assert_allclose(nothing.v @ nothing.v.T, np.eye(3), atol=1e-4)


def test_named_leaves_keep_their_places():
    spec = LoraSpec(targets="*", rank={"wide": 2, "*": 1}, alpha={"wide": 6, "*": 5}, init="pissa-fast")
    leaves = dict(named_leaves(lorax.adapt(KEY, PARAMS, spec)))
    assert {name: (leaf.rank, float(leaf.scale)) for name, leaf in leaves.items()} == {
        "heads": (1, 5.0),
        "stacked": (1, 5.0),
        "wide": (2, 3.0),
    }
