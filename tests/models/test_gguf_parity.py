"""Every family out of a GGUF file and out of a directory: one config, one tree, the same logits."""

import importlib.util
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import gguf_weights, write_gguf

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.models import load
from lorax.models.gguf import read_gguf

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "models"

_spec = importlib.util.spec_from_file_location("make_models", TESTS / "golden" / "make_models.py")
assert _spec is not None
assert _spec.loader is not None
make_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_models)

# The rope scaling that a file's divisors can tell is that of the published models.
PUBLISHED = {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
IDS = jnp.asarray(np.arange(19)[None] * 7 % 41, jnp.int32)


def config_of(family):
    """The family's golden config, in the terms of an older file."""
    config = json.loads((GOLDEN / family / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    if rope["rope_type"] == "llama3":
        rope |= PUBLISHED
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    defaults = {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
    fixed = {"rope_theta": rope["rope_theta"], "bos_token_id": 1, "eos_token_id": 2}
    return defaults | {k: v for k, v in config.items() if v is not None} | fixed


def divisors(config):
    scaling, size = config.get("rope_scaling"), config["head_dim"]
    if scaling is None:
        return {}
    turns = 8192 / (2 * np.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)}


def vocabulary(config):
    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(["a", "b", "ab", *(f"t{i}" for i in range(3, config["vocab_size"]))])
        writer.add_token_merges(["a b"])

    return extra


def both(family, folder):
    """The model out of a directory and out of a GGUF file."""
    config = config_of(family)
    weights = make_models.weights(json.loads((GOLDEN / family / "shapes.json").read_text(encoding="utf-8")))
    hf = folder / "hf"
    hf.mkdir()
    safetensors.write_arrays(hf / "model.safetensors", weights)
    (hf / "config.json").write_text(json.dumps(config))
    file = write_gguf(folder / "m.gguf", config, gguf_weights(config, weights) | divisors(config), vocabulary(config))
    return load(hf), load(file)


@pytest.mark.parametrize("family", ["llama-biases", "llama2", "llama3", "mistral", "qwen2.5", "qwen3", "smollm2"])
def test_a_gguf_file_computes_what_the_directory_does(family, tmp_path):
    theirs, ours = both(family, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
    assert ours.tokenizer.encode("abb") == [2, 1]
    want = theirs.apply(theirs.params, IDS)
    np.testing.assert_allclose(ours.apply(ours.params, IDS), want, atol=1e-6, rtol=0)
    assert float(jnp.abs(want).max()) > 1
    assert (ours.config.attention_bias, ours.config.output_bias) == {
        "llama-biases": (True, True),
        "qwen2.5": (True, False),
    }.get(family, (False, False))
    assert ours.config.sliding_window == (5 if family == "mistral" else None)
    assert (ours.config.rope_scaling is not None) == (family == "llama3")


@pytest.mark.parametrize("window", [-1, 0.5, "wide"])
def test_a_window_that_is_no_number_of_tokens_is_named(window, tmp_path):
    config = config_of("qwen2.5")
    add = {int: "add_int32", float: "add_float32", str: "add_string"}[type(window)]
    table = {"token_embd.weight": np.ones((7, 2), np.float32)}
    extra = lambda writer: getattr(writer, add)("qwen2.attention.sliding_window", window)  # noqa: E731
    path = write_gguf(tmp_path / "x.gguf", config, table, extra)
    with pytest.raises(LoraxError, match=r"x\.gguf: key 'qwen2\.attention\.sliding_window' must be one number"):
        read_gguf(path)


def test_a_window_in_some_layers_is_named(tmp_path):
    def extra(writer: gguf.GGUFWriter):
        writer.add_sliding_window(4)
        writer.add_sliding_window_pattern([True, False])

    table = {"token_embd.weight": np.ones((7, 2), np.float32)}
    path = write_gguf(tmp_path / "x.gguf", config_of("qwen2.5"), table, extra)
    with pytest.raises(LoraxError, match="window in some of the layers is not served"):
        read_gguf(path)
