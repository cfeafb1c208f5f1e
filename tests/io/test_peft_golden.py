"""Adapters as PEFT writes them (`tests/golden/peft`): its logits come out, and its bytes are written back."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.io import safetensors, torch_zip
from lorax.io.peft_config import read
from lorax.models import load

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(path.name for path in (GOLDEN / "peft").iterdir())
WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
# What the oldest releases that still run wrote, and one between them and today's.
OLD = {"peft-0.1.0", "peft-0.1.0-biases", "peft-0.5.0", "peft-0.9.0"}

_spec = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
assert _spec is not None
assert _spec.loader is not None
make_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_models)


@functools.cache
def base(family):
    """The golden model that an adapter is for."""
    shapes = json.loads((GOLDEN / "models" / family / "shapes.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.write_arrays(Path(folder) / "model.safetensors", make_models.weights(shapes))
        (Path(folder) / "config.json").write_bytes((GOLDEN / "models" / family / "config.json").read_bytes())
        return load(folder)


@functools.cache
def compiled(family):
    return jax.jit(base(family).apply)


def settings(folder):
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def opened(name):
    folder = GOLDEN / "peft" / name
    model = base(settings(folder)["base_model_name_or_path"])
    return folder, model, lorax.load_adapter(folder, model.params)


def tensors(folder):
    if (folder / PICKLED).exists():
        return {name: stored.array() for name, stored in torch_zip.read(folder / PICKLED).items()}
    return {name: stored.array() for name, stored in safetensors.read(folder / WEIGHTS).items()}


def test_every_kind_is_there():
    kinds = {"lora", "rslora", "patterns", "layer-ranks", "modules_to_save", "biases", "bf16", "fp16"}
    assert kinds | OLD == set(ADAPTERS)
    for name in OLD - {"peft-0.9.0"}:
        assert (GOLDEN / "peft" / name / PICKLED).exists()
    assert {x.dtype.name for x in tensors(GOLDEN / "peft" / "fp16").values()} == {"float16"}
    assert settings(GOLDEN / "peft" / "rslora")["use_rslora"] is True
    assert {x.dtype.name for x in tensors(GOLDEN / "peft" / "bf16").values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_pefts(name):
    folder, model, params = opened(name)
    with np.load(folder / "golden.npz") as file:
        ids, want = jnp.asarray(file["ids"]), file["logits"]
    # Merged, because one program then serves all adapters of a base; lifted once.
    apply = compiled(settings(folder)["base_model_name_or_path"])
    np.testing.assert_allclose(apply(lorax.merge(params), ids), want, atol=1e-4, rtol=0)
    assert np.abs(apply(model.params, ids) - want).max() > 1, "the adapter matters"
    if name == "patterns":
        np.testing.assert_allclose(jax.jit(lorax.lift(model.apply))(params, ids), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(OLD))
def test_what_old_releases_wrote_is_written_as_it_would_be_today(name, tmp_path):
    folder, _, params = opened(name)
    lorax.save_adapter(tmp_path / "back", params)
    theirs, ours = tensors(folder), tensors(tmp_path / "back")
    # A bias beside factors has another name since.
    same = {key.replace(".base_layer.", "."): value for key, value in ours.items()}
    assert {key.replace(".base_layer.", ".").removesuffix("_vector.weight") for key in theirs} == {
        key.removesuffix("_vector") for key in same
    } or theirs.keys() == same.keys()
    for key, value in theirs.items():
        other = same.get(key.replace(".base_layer.", "."), same.get(key.removesuffix(".weight")))
        np.testing.assert_array_equal(other, value)
    same_scales(folder, tmp_path / "back")


def test_several_files_with_an_index_are_one_adapter(tmp_path):
    folder, model, params = opened("lora")
    whole = tensors(folder)
    places = {}
    for i, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2]), 1):
        file = f"adapter_model-{i:05d}-of-00002.safetensors"
        safetensors.write_arrays(tmp_path / file, {name: whole[name] for name in names})
        places |= dict.fromkeys(names, file)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    found = lorax.load_adapter(tmp_path, model.params)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, two)
    (tmp_path / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(lorax.LoraxError, match=r"00002-of-00002\.safetensors: cannot be read"):
        lorax.load_adapter(tmp_path, model.params)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in OLD | {"layer-ranks"}])
def test_written_back_it_is_the_same_file(name, tmp_path):
    folder, _, params = opened(name)
    lorax.save_adapter(tmp_path / "back", params)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    same_scales(folder, tmp_path / "back")


def test_ranks_that_differ_by_layer_are_written_back_filled_up_with_zeros(tmp_path):
    folder, _, params = opened("layer-ranks")
    lorax.save_adapter(tmp_path / "back", params)
    theirs, ours = tensors(folder), tensors(tmp_path / "back")
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        kept = tuple(slice(size) for size in x.shape)
        np.testing.assert_array_equal(ours[name][kept], x)
        assert np.count_nonzero(ours[name]) == np.count_nonzero(x)
    same_scales(folder, tmp_path / "back")


def same_scales(theirs, ours):
    """Both configurations give every module the same scale."""
    modules = {}
    for folder in (theirs, ours):
        config = read(folder / CONFIG)
        for name, x in tensors(folder).items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                modules.setdefault(module, []).append(config.scale(module, x.shape[0]))
    assert modules
    for module, (one, other) in modules.items():
        assert one == pytest.approx(other, rel=1e-6), module
