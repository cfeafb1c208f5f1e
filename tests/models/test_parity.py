"""Logits of every family against what transformers computed (`tests/golden/models`), through the directory loader."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.io import safetensors
from lorax.models import generate, load, save_hf

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "models"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())

_spec = importlib.util.spec_from_file_location("make_models", TESTS / "golden" / "make_models.py")
assert _spec is not None
assert _spec.loader is not None
make_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_models)


def written(family: str, folder: Path) -> Path:
    """The family's tiny model as a directory of files."""
    shapes = json.loads((GOLDEN / family / "shapes.json").read_text(encoding="utf-8"))
    safetensors.write_arrays(folder / "model.safetensors", make_models.weights(shapes))
    (folder / "config.json").write_bytes((GOLDEN / family / "config.json").read_bytes())
    return folder


def golden(family: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(GOLDEN / family / "golden.npz") as file:
        return file["ids"], file["logits"]


def test_all_families_are_there():
    named = ("llama2", "llama3", "mistral", "qwen2.5", "qwen3", "smollm2")
    assert {"llama-biases", "qwen2-window", *named} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    model = load(written(family, tmp_path))
    ids, want = golden(family)
    got = model.apply(model.params, jnp.asarray(ids))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again_in_shards(family, tmp_path):
    (tmp_path / "a").mkdir()
    model = load(written(family, tmp_path / "a"))
    save_hf(tmp_path / "b", model, model.params, max_shard=5_000)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    again = load(tmp_path / "b")
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for x, y in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x, y)
    ids, want = golden(family)
    np.testing.assert_allclose(again.apply(again.params, jnp.asarray(ids)), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
def test_the_window_holds_in_the_cache(family, tmp_path):
    """A prompt read in two chunks, then token by token, past the window."""
    model = load(written(family, tmp_path))
    ids, want = golden(family)
    decode, cache, got = jax.jit(model.decode), model.init_cache(*ids.shape), []
    for chunk in np.split(ids, [7, 14, *range(15, ids.shape[1])], axis=1):
        logits, cache = decode(model.params, jnp.asarray(chunk), cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_adapted_family_equals_its_merged_weights(family, tmp_path):
    model = load(written(family, tmp_path))
    ids = jnp.asarray(golden(family)[0])
    spec = lorax.LoraSpec(rank=2)
    adapted = lorax.adapt(jax.random.key(0), model.params, spec, fn=model.apply, args=(ids,))
    trainable, frozen = lorax.split(adapted)
    adapted = lorax.join(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    want = model.apply(lorax.merge(adapted), ids)
    got = lorax.lift(model.apply)(adapted, ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.base
def test_smollm2_knows_the_capital_of_france(base_model):
    model = base_model
    assert sum(x.size for x in jax.tree.leaves(model.params)) == 134_515_008
    ids = model.tokenizer.encode("The capital of France is")
    (out,) = generate(model, model.params, [ids], max_new_tokens=3)
    assert model.tokenizer.decode(out).startswith(" Paris")
