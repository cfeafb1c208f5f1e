"""Loading in few bits: as quantising the loaded tree, never more than a layer dense; 4-bit files in and out."""

import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import LoraxError, Quantized, QuantSpec
from lorax.models import ModelConfig, load, save_hf
from lorax.models.model import Model
from lorax.tree import named_leaves

CONFIG = ModelConfig("llama", 97, 64, 96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
IDS = jax.ShapeDtypeStruct((1, 5), jnp.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with fresh weights; the head is its own."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = Model.init(CONFIG, jax.random.key(0))
    save_hf(folder, model, model.params)
    return folder


@pytest.fixture
def packed(base, tmp_path):
    """The same model as a checkpoint in 4 bits."""
    model = load(base, quantize=QuantSpec())
    save_hf(tmp_path / "packed", model, model.params)
    return tmp_path / "packed"


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec("fp4", double_quant=False, block_size=32),
        QuantSpec("int8"),
        QuantSpec("nf4", targets=("layers/mlp/*", "lm_head/kernel")),
    ],
    ids=lambda spec: spec.describe() + str(len(spec.targets)),
)
def test_loading_packed_is_quantising_what_was_loaded(base, spec, dtype):
    plain = load(base, dtype)
    want = lorax.quantize(
        plain.params, spec.targets, spec.format, spec.double_quant, spec.block_size, fn=plain.apply, args=(IDS,)
    )
    model = load(base, dtype, quantize=spec)
    assert any(isinstance(leaf, Quantized) for _, leaf in named_leaves(model.params))
    equal(model.params, want)


def test_no_more_than_a_layer_is_dense_at_a_time(base, monkeypatch):
    from lorax.models import read

    alive, most = [], []
    real = read._read_layer

    def counted(*args):
        array = real(*args)
        alive.append(weakref.ref(array))
        most.append(sum(one() is not None for one in alive))
        return array

    monkeypatch.setattr(read, "_read_layer", counted)
    load(base, quantize=QuantSpec())
    assert len(most) == 7 * CONFIG.num_layers
    assert max(most) <= 2, "the next layer is read while the last one is still held by its caller"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (QuantSpec(targets="layers/attn_norm/scale"), "attn_norm/scale is no matrix"),
        (QuantSpec(targets="layers/nothing"), "quantize.targets: 'layers/nothing' matches no weight"),
    ],
)
def test_targets_that_cannot_be_packed(base, spec, says):
    with pytest.raises(LoraxError, match=says.replace(".", r"\.")):
        load(base, quantize=spec)


def test_spec_refuses_what_it_does_not_know():
    with pytest.raises(LoraxError, match="format 'nf3' is unknown"):
        QuantSpec("nf3")
    with pytest.raises(LoraxError, match="block_size 48"):
        QuantSpec(block_size=48)


def test_nan_is_refused_with_path_and_layer(base, tmp_path):
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(LoraxError, match=r"layers/mlp/up_proj/kernel \(layer 1\).*NaN"):
        load(tmp_path, quantize=QuantSpec())


def test_a_checkpoint_in_4_bits_comes_back_exactly(base, packed):
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["llm_int8_skip_modules"] == ["lm_head"]
    names = set(safetensors.numpy.load_file(packed / "model.safetensors"))
    at = "model.layers.2.mlp.up_proj.weight"
    beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    assert {at, *(f"{at}.{name}" for name in beside)} <= names
    want = load(base, quantize=QuantSpec())
    equal(load(packed).params, want.params)
    equal(load(packed, quantize=QuantSpec()).params, want.params)
    ids = jnp.array([[3, 96, 5, 0]])
    got = lorax.lift(want.apply)(load(packed).params, ids)
    np.testing.assert_array_equal(got, lorax.lift(want.apply)(want.params, ids))


def test_another_format_than_the_file_has_is_refused(packed):
    with pytest.raises(LoraxError, match="kept there as nf4 in blocks of 64, double quantisation, and fp4"):
        load(packed, quantize=QuantSpec("fp4"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w, at: w.pop(f"{at}.absmax"), "'absmax' is missing"),
        (lambda w, at: w.update({f"{at}.absmax": w[f"{at}.absmax"][:-1]}), "absmax: "),
        (lambda w, at: w.update({at: w[at][:-1]}), "codes: "),
        (lambda w, at: w.update({f"{at}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}), "is damaged"),
        (lambda w, at: w.pop(f"{at}.quant_state.bitsandbytes__nf4"), "has shape"),
    ],
)
def test_a_damaged_checkpoint_names_file_and_tensor(packed, tmp_path, change, says):
    weights = safetensors.numpy.load_file(packed / "model.safetensors")
    change(weights, "model.layers.1.self_attn.q_proj.weight")
    safetensors.numpy.save_file(weights, packed / "model.safetensors")
    with pytest.raises(LoraxError, match=says) as caught:
        load(packed)
    assert "model.safetensors" in str(caught.value)
    assert "model.layers.1.self_attn.q_proj.weight" in str(caught.value)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
def test_other_quantisations_are_refused_with_the_way_out(packed, settings):
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(LoraxError, match="not served; lorax reads bitsandbytes in 4 bits"):
        load(packed)


@pytest.mark.parametrize(
    ("targets", "format", "says"),
    [("all-linear", "int8", "hold nf4 and fp4, not int8"), ("embed/embedding", "nf4", "linear layers in 4 bits")],
)
def test_saving_what_a_checkpoint_cannot_hold(base, tmp_path, targets, format, says):
    model = load(base, quantize=QuantSpec(format, targets=targets))
    with pytest.raises(LoraxError, match=says):
        save_hf(tmp_path / "out", model, model.params)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_partly_packed_says_what_is_not(base, tmp_path):
    model = load(base, quantize=QuantSpec(targets=("layers/mlp/*",)))
    save_hf(tmp_path / "out", model, model.params)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    names = [f"self_attn.{name}_proj" for name in "koqv"]
    assert settings["llm_int8_skip_modules"] == ["lm_head", *names]
    equal(load(tmp_path / "out").params, model.params)


def test_an_adapter_knows_its_quantised_base(base, tmp_path):
    model = load(base, quantize=QuantSpec())
    adapted = lorax.adapt(jax.random.key(0), model.params, lorax.LoraSpec(rank=2), fn=model.apply, args=(IDS,))
    lorax.save_adapter(tmp_path / "adapter", adapted)
    equal(lorax.load_adapter(tmp_path / "adapter", model.params), adapted)
    # The 16-bit weights are alike enough; those of another model are not.
    lorax.load_adapter(tmp_path / "adapter", load(base).params)
    other = Model.init(CONFIG, jax.random.key(1))
    with pytest.raises(LoraxError, match="the adapter is for another base"):
        lorax.load_adapter(tmp_path / "adapter", other.params)


def test_the_report_counts_parameters_and_the_bytes_that_hold_them(base):
    model = load(base, quantize=QuantSpec())
    rows = {row.path: row for row in lorax.report(model.params).rows}
    row = rows["layers/mlp/up_proj/kernel"]
    assert (row.kind, row.dtype, row.frozen) == ("quantised", "nf4", 3 * 64 * 96)
    assert row.frozen_bytes == model.params["layers"]["mlp"]["up_proj"]["kernel"].nbytes < row.frozen
