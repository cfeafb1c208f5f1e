"""Small GGUF files for tests, written by the reference library."""

import gguf
import numpy as np

CONFIG = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def hf_weights(config, seed=0):
    """Random weights of a Hugging Face model, by name."""
    c, rng = config, np.random.default_rng(seed)
    d, f, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (width, d)
            if c["model_type"] == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (width,)
        if c["model_type"] == "qwen3":
            shapes |= {at + "self_attn.q_norm.weight": (hd,), at + "self_attn.k_norm.weight": (hd,)}
        shapes |= {at + "self_attn.o_proj.weight": (d, q), at + "mlp.down_proj.weight": (d, f)}
        shapes |= {at + "mlp.gate_proj.weight": (f, d), at + "mlp.up_proj.weight": (f, d)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def architecture(config):
    """What GGUF calls a model of this config: Mistral's files say llama."""
    return "llama" if config["model_type"] == "mistral" else config["model_type"]


def interleaved(rows, heads):
    """Query or key rows as converters write them for the architecture llama: feature i of a head beside i + half."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def gguf_weights(config, weights):
    """The same weights by GGUF's names and in its order of rows."""
    out = {}
    for name, x in weights.items():
        if name in TOP:
            out[TOP[name]] = x
            continue
        _, _, layer, rest = name.split(".", 3)
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(rest[10:11], 0)
        turned = architecture(config) == "llama" and rest.startswith(("self_attn.q_proj.", "self_attn.k_proj."))
        out[f"blk.{layer}.{LAYER[rest]}"] = interleaved(x, heads) if turned else x
    return out


def write_gguf(path, config, tensors, extra=lambda writer: None):
    """tensors: name -> array, or (bytes array, ggml type) of one that is quantised already."""
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    extra(writer)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
