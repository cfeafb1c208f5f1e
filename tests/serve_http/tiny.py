"""A base of a few thousand parameters with a tokenizer, and adapters for it, as files."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from lorax.models import Model, ModelConfig, save_hf
from lorax.models.tokenizer import Tokenizer

LAYERS, DIM, HEADS, KV, HEAD, MLP = 2, 32, 4, 2, 8, 48
VOCAB = 259
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
# module -> (outputs, inputs)
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, DIM),
    "self_attn.k_proj": (KV * HEAD, DIM),
    "self_attn.v_proj": (KV * HEAD, DIM),
    "self_attn.o_proj": (DIM, HEADS * HEAD),
    "mlp.gate_proj": (MLP, DIM),
    "mlp.up_proj": (MLP, DIM),
    "mlp.down_proj": (DIM, MLP),
}


def tokenizer() -> Tokenizer:
    """A token a character, all of them printable, and one that ends a text."""
    letters = [chr(c) for c in (10, *range(32, 127), *range(0xC0, 0xC0 + 160))]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(["<end>", "<pad>", "<unk>"])
    assert inner.get_vocab_size() == VOCAB
    return Tokenizer(inner, None, 256, 257, TEMPLATE)


def save_base(folder: Path, seed: int = 0, layers: int = LAYERS) -> Path:
    """Write the base as a Hugging Face directory. Its weights are large enough for answers that differ."""
    config = ModelConfig(
        "llama", VOCAB, DIM, MLP, num_layers=layers, num_heads=HEADS, num_kv_heads=KV, head_dim=HEAD, eos_ids=(256,)
    )
    model = Model.init(config, jax.random.key(seed))
    params = jax.tree.map(lambda w: w * 8 if w.ndim > 1 and float(w.std()) > 0 else w, model.params)
    save_hf(folder, Model(config, params, tokenizer()), params)
    return folder


def save_adapter(
    folder: Path, seed: int, rank: int, modules=tuple(SHAPES), layers: int = LAYERS, dim: int = DIM
) -> Path:
    """Write an adapter as PEFT does, drawn from its seed."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(layers):
        for name in modules:
            out, inside = SHAPES[name]
            inside = dim if inside == DIM else inside
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = rng.normal(0, inside**-0.5, (rank, inside)).astype(np.float32)
            tensors[f"{place}.lora_B.weight"] = rng.normal(0, 0.4 * rank**-0.5, (out, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": sorted({name.split(".")[1] for name in modules}), "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
