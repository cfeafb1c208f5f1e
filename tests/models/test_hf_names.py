"""Weights in and out: both kinds of file give the same tree, bit by bit, without a second copy in memory."""

import json
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf_files import CONFIG, gguf_weights, hf_weights, write_gguf

from lorax.errors import LoraxError
from lorax.models import ModelConfig, load, save_hf
from lorax.models.hf import open_checkpoint
from lorax.models.model import abstract_params
from lorax.models.read import load_params

FAMILIES = {
    "llama": CONFIG,
    "llama-tied": CONFIG | {"tie_word_embeddings": True},
    "mistral": CONFIG | {"model_type": "mistral", "sliding_window": None},
    "qwen2": CONFIG | {"model_type": "qwen2", "head_dim": 6},
    "qwen3": CONFIG | {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
}
EACH = pytest.mark.parametrize("family", FAMILIES)


def directory(folder, config, weights, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: weights[n] for n in weights if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def read(path, dtype=jnp.float32):
    source = open_checkpoint(path)
    return load_params(source, ModelConfig.from_hf(source.config), dtype)


def tree_of(config, w):
    """The parameter tree, written out from the Hugging Face names."""
    layers = [f"model.layers.{i}." for i in range(config["num_hidden_layers"])]

    def stack(name):
        return np.stack([w[at + name].T if w[at + name].ndim == 2 else w[at + name] for at in layers])

    def projections(block, names):
        out = {}
        for name in names:
            out[f"{name}_proj"] = {"kernel": stack(f"{block}.{name}_proj.weight")}
            if f"{layers[0]}{block}.{name}_proj.bias" in w:
                out[f"{name}_proj"]["bias"] = stack(f"{block}.{name}_proj.bias")
        return out

    attention = projections("self_attn", "qkvo")
    for name in ("q_norm", "k_norm"):
        if f"{layers[0]}self_attn.{name}.weight" in w:
            attention[name] = {"scale": stack(f"self_attn.{name}.weight")}
    tree = {
        "embed": {"embedding": w["model.embed_tokens.weight"]},
        "layers": {
            "attn_norm": {"scale": stack("input_layernorm.weight")},
            "attn": attention,
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": projections("mlp", ("gate", "up", "down")),
        },
        "norm": {"scale": w["model.norm.weight"]},
    }
    if "lm_head.weight" in w:
        tree["lm_head"] = {"kernel": w["lm_head.weight"].T}
    return tree


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@EACH
@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_gives_the_tree(tmp_path, family, shards):
    config, weights = FAMILIES[family], hf_weights(FAMILIES[family])
    params = read(directory(tmp_path / "m", config, weights, shards))
    assert_same(params, tree_of(config, weights))
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(ModelConfig.from_hf(config)))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_same_tree(tmp_path, family):
    config, weights = FAMILIES[family], hf_weights(FAMILIES[family])
    params = read(write_gguf(tmp_path / "m.gguf", config, gguf_weights(config, weights)))
    assert_same(params, tree_of(config, weights))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_values_are_converted_while_they_are_copied(tmp_path, stored, wanted):
    weights = {name: x.astype(stored) for name, x in hf_weights(CONFIG).items()}
    folder = directory(tmp_path / "m", CONFIG, weights)
    want = jax.tree.map(lambda x: x.astype(wanted), tree_of(CONFIG, weights))
    assert_same(read(folder, wanted), want)


def test_what_the_config_determines_is_left_aside(tmp_path):
    config, weights = FAMILIES["llama-tied"], hf_weights(FAMILIES["llama-tied"])
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same(read(directory(tmp_path / "m", config, weights | more)), tree_of(config, weights))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(Q), rf"m: tensor '{Q}' is missing"),
        (lambda w: w.update({Q: w[Q][:-1]}), rf"model\.safetensors: tensor '{Q}' has shape \(31, 32\)"),
        (lambda w: w.update({Q: w[Q].astype(np.int32)}), rf"tensor '{Q}' is I32"),
        (lambda w: w.update({"model.layers.3.x.weight": w[Q]}), r"'model\.layers\.3\.x\.weight' \(1 such\)"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w[Q][0]}), r"q_proj\.bias"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path, change, said):
    weights = hf_weights(CONFIG)
    change(weights)
    with pytest.raises(LoraxError, match=said):
        read(directory(tmp_path / "m", CONFIG, weights))


def test_a_config_that_lies_about_its_size_costs_nothing(tmp_path):
    folder = directory(tmp_path / "m", CONFIG | {"num_hidden_layers": 10**9, "vocab_size": 37}, hf_weights(CONFIG))
    with pytest.raises(LoraxError, match=r"'model\.layers\.3\..*' is missing"):
        read(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 2**50}))
    with pytest.raises(LoraxError, match="has shape"):
        read(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"m/config\.json: cannot be read"),
        ({"config.json": "[]"}, r"config\.json: not a JSON object"),
        ({"config.json": "{"}, r"config\.json: not valid JSON"),
        ({"config.json": json.dumps(CONFIG)}, r"holds neither model\.safetensors nor"),
        ({"config.json": json.dumps(CONFIG), "pytorch_model.bin": ""}, "pickled weights"),
    ],
)
def test_a_directory_that_is_no_model_is_named(tmp_path, files, said):
    (tmp_path / "m").mkdir()
    for name, text in files.items():
        (tmp_path / "m" / name).write_text(text)
    with pytest.raises(LoraxError, match=said):
        open_checkpoint(tmp_path / "m")


@EACH
@pytest.mark.parametrize("max_shard", [1 << 30, 20_000])
def test_saving_and_loading_is_the_identity(tmp_path, family, max_shard):
    config = FAMILIES[family]
    model = load(directory(tmp_path / "in", config, hf_weights(config)), jnp.bfloat16)
    save_hf(tmp_path / "m", model, model.params, max_shard)
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard == 20_000)
    again = load(tmp_path / "m", jnp.bfloat16)
    assert again.config == model.config
    assert_same(again.params, model.params)


def test_what_is_saved_has_hugging_face_names_and_shapes(tmp_path):
    weights = hf_weights(CONFIG)
    model = load(directory(tmp_path / "in", CONFIG, weights))
    save_hf(tmp_path / "out", model, model.params)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(written[name], x)


def test_a_tree_of_another_config_is_refused_and_the_old_directory_stays(tmp_path):
    model = load(directory(tmp_path / "in", CONFIG, hf_weights(CONFIG)))
    save_hf(tmp_path / "out", model, model.params)
    with pytest.raises(LoraxError, match="lm_head/kernel"):
        save_hf(tmp_path / "out", model, {k: v for k, v in model.params.items() if k != "lm_head"})
    with pytest.raises(LoraxError, match="embed/embedding"):
        save_hf(tmp_path / "out", model, model.params | {"embed": {"embedding": jnp.zeros((3, 32))}})
    assert (tmp_path / "out" / "model.safetensors").exists()


WIDE = CONFIG | {"vocab_size": 24_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}

MEASURE = """
    import re, sys
    import jax, jax.numpy as jnp
    from lorax.models.config import ModelConfig
    from lorax.models.hf import open_checkpoint
    from lorax.models.read import load_params

    def kilobytes(key):
        return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

    jax.device_put(jnp.zeros(3), may_alias=True).block_until_ready()
    source = open_checkpoint(sys.argv[1])
    before = kilobytes("VmRSS")
    params = load_params(source, ModelConfig.from_hf(source.config), sys.argv[2])
    print((kilobytes("VmHWM") - before) * 1024, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def empty_directory(folder, config, dtype, size):
    """A model of zeros in a file with a hole: written in no time, read like any other."""
    header, at = {}, 0
    for name, shape in hf_shapes(config).items():
        end = at + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


def hf_shapes(config):
    tiny = config | {"vocab_size": 1, "num_hidden_layers": 1}
    one = {name: x.shape for name, x in hf_weights(tiny).items()}
    shapes = {name: (config["vocab_size"], *shape[1:]) for name, shape in one.items() if shape[0] == 1}
    shapes |= {"model.norm.weight": one["model.norm.weight"]}
    for i in range(config["num_hidden_layers"]):
        shapes |= {n.replace(".0.", f".{i}."): shape for n, shape in one.items() if ".0." in n}
    return shapes


@pytest.mark.parametrize(("stored", "size", "wanted"), [("F32", 4, "float32"), ("BF16", 2, "float32")])
def test_loading_holds_the_weights_once(tmp_path, stored, size, wanted):
    folder = empty_directory(tmp_path / "m", WIDE, stored, size)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, done.stdout.split())
    assert held > 200e6
    assert peak < 1.15 * held + 30e6
