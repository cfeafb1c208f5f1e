"""Configs: what a config.json means, what is refused, and that writing one and reading it back changes nothing."""

import dataclasses
import json
from pathlib import Path

import pytest

from lorax.errors import LoraxError
from lorax.models import ModelConfig, RopeScaling

GOLDEN = Path(__file__).parents[1] / "golden" / "models"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_what_a_file_leaves_out_has_the_family_defaults():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (5, 4, 1e-6)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (10000.0, None, False)
    assert (config.max_length, config.bos_id, config.eos_ids) == (2048, None, ())
    mistral = ModelConfig.from_hf({**LLAMA, "model_type": "mistral", "num_attention_heads": 8, "head_dim": 4})
    assert (mistral.sliding_window, mistral.num_kv_heads) == (4096, 8)
    qwen3 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen3", "num_attention_heads": 32})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias) == (128, True, False)
    qwen2 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 1})
    assert (qwen2.qk_norm, qwen2.attention_bias, qwen2.sliding_window) == (False, True, None)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_settings_are_read_from_new_and_old_files(key):
    theta = {"rope_theta": 500000.0}
    file = {**LLAMA, key: {**LLAMA3_SCALING, **(theta if key == "rope_parameters" else {})}}
    config = ModelConfig.from_hf(file if key == "rope_parameters" else {**file, **theta})
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_one_or_several_tokens_end_a_text():
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": 7}).eos_ids == (7,)
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": [7, 9]}).eos_ids == (7, 9)


def test_qwen_uses_its_window_only_when_told_to():
    qwen = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 1, "sliding_window": 6}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 0}).sliding_window == 6
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 2}).sliding_window is None
    some = {**qwen, "use_sliding_window": True, "max_window_layers": 1}
    assert (ModelConfig.from_hf(some).sliding_window, ModelConfig.from_hf(some).full_layers) == (6, 1)
    kinds = ["full_attention", "sliding_attention"]
    assert ModelConfig.from_hf({**some, "layer_types": kinds}) == ModelConfig.from_hf(some)
    with pytest.raises(LoraxError, match="other orders"):
        ModelConfig.from_hf({**some, "layer_types": kinds[::-1]})
    with pytest.raises(LoraxError, match="max_window_layers must be a number of layers, not -1"):
        ModelConfig.from_hf({**some, "max_window_layers": -1})


def test_llama_and_qwen3_have_biases_when_told_to():
    config = ModelConfig.from_hf({**LLAMA, "attention_bias": True})
    assert (config.attention_bias, config.output_bias) == (True, True)
    qwen2 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 1})
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)


@pytest.mark.parametrize("family", sorted(p.name for p in GOLDEN.iterdir()))
def test_to_hf_and_back_is_the_same_config(family):
    config = ModelConfig.from_hf(json.loads((GOLDEN / family / "config.json").read_text()))
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    windowed = dataclasses.replace(config, sliding_window=None if config.family == "llama" else 9)
    assert ModelConfig.from_hf(windowed.to_hf()) == windowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*is not served"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": -4}, "hidden_size.*at least 1, not -4"),
        ({"hidden_size": "20"}, "hidden_size.*not '20'"),
        ({"num_hidden_layers": True}, "num_hidden_layers.*not True"),
        ({"num_key_value_heads": 2}, "not a multiple of num_kv_heads 2"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not served"),
        ({"mlp_bias": True}, "mlp_bias = True is not served"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True is not served for mistral"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' is not served"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": None}}, "factor must be a number"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 0.5}}, "must be above low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
    ],
)
def test_what_the_decoder_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(LoraxError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


def test_something_else_than_an_object_is_refused():
    with pytest.raises(LoraxError, match="not a JSON object"):
        ModelConfig.from_hf([1, 2])  # pyright: ignore[reportArgumentType]
