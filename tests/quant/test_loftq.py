"""LoftQ: less error with each turn, the same from files as from memory, and what training changed without the start."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, QuantSpec
from lorax.models import ModelConfig, Original, load, save_hf
from lorax.models.model import Model
from lorax.quant import fit_factors, merge_trained
from lorax.quant.best_rank import best_factors
from lorax.tree import named_leaves
from lorax.weights import Axes, LowRank

CONFIG = ModelConfig("llama", 97, 64, 96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
IDS = jax.ShapeDtypeStruct((1, 5), jnp.int32)
SPEC = LoraSpec(targets="w", rank=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    model = Model.init(CONFIG, jax.random.key(0))
    save_hf(folder, model, model.params)
    return folder


@pytest.fixture(scope="module")
def params():
    return {"w": 0.02 * jax.random.normal(jax.random.key(1), (2, 130, 96))}


@pytest.fixture(scope="module")
def fitted(params):
    return {steps: lorax.loftq(params, SPEC, steps=steps) for steps in (1, 2)}


def equal(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(2, 203, 150), (2, 40, 30)])
def test_factors_hold_nearly_all_that_the_best_ones_hold(shape):
    rng = np.random.default_rng()
    error, scale = rng.normal(size=shape), np.array([2.0, -0.5])
    a, b = best_factors(jnp.asarray(error, jnp.float32), Axes((0,), (1,), (2,)), 6, jnp.asarray(scale, jnp.float32))
    found = scale[:, None, None] * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
    left = ((error - found) ** 2).sum((1, 2))
    best = (np.linalg.svd(error, compute_uv=False)[:, :6] ** 2).sum(1)
    assert ((error**2).sum((1, 2)) - left > 0.98 * best).all(), "a flat spectrum is the hardest there is"
    np.testing.assert_allclose(np.linalg.norm(a, axis=(1, 2)), np.linalg.norm(b, axis=(1, 2)), rtol=1e-3)


def test_an_error_of_nothing_gives_factors_of_nothing():
    a, b = best_factors(jnp.zeros((2, 203, 150)), Axes((0,), (1,), (2,)), 6, jnp.ones(2))
    assert not a.any()
    assert not b.any()


def test_each_way_is_nearer_to_the_weight_than_quantising_alone(params, fitted):
    plain = lorax.quantize(params, targets="w")["w"].dense()
    off = [float(jnp.linalg.norm(x - params["w"])) for x in (plain, fitted[1]["w"].dense(), fitted[2]["w"].dense())]
    assert off[0] > 1.02 * off[1] > 1.02**2 * off[2]


def test_one_turn_leaves_the_base_that_quantising_gives(params, fitted):
    packed = lorax.quantize(params, targets="w")["w"]
    equal(fitted[1]["w"].base, packed)
    assert (fitted[2]["w"].base.array.codes != packed.array.codes).any()


@pytest.mark.parametrize("steps", [1, 2])
def test_merging_what_training_changed_leaves_the_start_out(params, fitted, steps):
    start = fitted[steps]["w"]
    rng = np.random.default_rng()
    a, b = (jnp.asarray(x + 0.01 * rng.normal(size=x.shape), jnp.float32) for x in (start.A, start.B))
    merged = merge_trained({"w": replace(start, A=a, B=b)}, lambda path, at: params[path][at])["w"]
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    want = wide(params["w"]) + float(start.scale) * (wide(a) @ wide(b) - wide(start.A) @ wide(start.B))
    np.testing.assert_allclose(merged, want, rtol=0, atol=2e-6)


def test_from_files_layer_by_layer_it_is_as_from_memory(base):
    spec, dtype = LoraSpec(targets="layers/mlp/*/kernel", rank=3), jnp.bfloat16
    plain, packed = load(base, dtype), load(base, dtype, quantize=QuantSpec(targets=spec.targets))
    want = lorax.loftq(plain.params, spec, steps=1, fn=plain.apply, args=(IDS,))
    adapted = lorax.adapt(jax.random.key(0), packed.params, spec, fn=packed.apply, args=(IDS,))
    asked = []
    original = Original(base, dtype)

    def counted(path, at):
        asked.append(at.stop - at.start)
        return original(path, at)

    got = fit_factors(adapted, counted)
    assert set(asked) == {1}, "a layer at a time"
    assert not original.packed
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, mine), (_, other) in zip(named_leaves(got), named_leaves(want), strict=True):
        if isinstance(mine, LowRank):
            equal(mine.base, other.base)
            np.testing.assert_allclose(mine.A @ mine.B, other.A @ other.B, rtol=0, atol=1e-5, err_msg=path)
        else:
            equal(mine, other)


def test_what_cannot_be_fitted_is_refused_with_its_path(params, base, tmp_path):
    eight = lorax.adapt(jax.random.key(0), lorax.quantize(params, targets="w", format="int8"), SPEC)
    with pytest.raises(LoraxError, match=r"w: LoftQ makes up for 4 bits, and this base is in int8"):
        fit_factors(eight, lambda path, at: params[path][at])
    four = lorax.adapt(jax.random.key(0), lorax.quantize(params, targets="w"), SPEC)
    with pytest.raises(LoraxError, match=r"w: holds NaN"):
        fit_factors(four, lambda path, at: params[path][at].at[0, 3, 4].set(jnp.nan))
    with pytest.raises(LoraxError, match="at least 1, not 0"):
        fit_factors(four, lambda path, at: params[path][at], 0)
    with pytest.raises(LoraxError, match="has no layers/nothing"):
        Original(base)("layers/nothing")
    with pytest.raises(LoraxError, match=r"loftq=1 says .*, and none is in this tree"):
        lorax.save_adapter(tmp_path / "adapter", lorax.adapt(jax.random.key(0), params, SPEC), loftq=1)
    model = load(base, quantize=QuantSpec())
    save_hf(tmp_path / "packed", model, model.params)
    assert Original(tmp_path / "packed").packed
    with pytest.raises(LoraxError, match=r"holds layers/mlp/up_proj/kernel in 4 bits"):
        Original(tmp_path / "packed")("layers/mlp/up_proj/kernel", slice(0, 1))
