"""Makes the golden logits of `tests/golden/models`: what Hugging Face transformers computes for tiny models.

    python tests/golden/make_models.py        (needs the `peers` extra: torch, transformers)

For each family: `config.json` as transformers writes it, and `golden.npz` with token ids and their logits. Weights are
not stored: they are made from their names by `weights`, out of the raw stream of a counter-based generator, which
numpy keeps the same for ever. `shapes.json` lists the names and shapes that transformers uses.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "models"

# Sizes are small, odd where they may be, and different from one another, so that no two axes can be mixed up.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {
        "model_type": "llama",
        "vocab_size": 59,
        "hidden_size": 18,
        "intermediate_size": 31,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
    },
    "llama3": {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "rms_norm_eps": 1e-5,
        "eos_token_id": [58, 60],
        # Wavelengths of 6 to 17,000 tokens: kept, blended and divided ones are all there.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-biases": {
        "model_type": "llama",
        "vocab_size": 43,
        "hidden_size": 14,
        "intermediate_size": 25,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "attention_bias": True,
    },
    "mistral": {
        "model_type": "mistral",
        "vocab_size": 53,
        "hidden_size": 22,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": 5,
    },
    # The first layer sees everything, the others the last four tokens.
    "qwen2-window": {
        "model_type": "qwen2",
        "vocab_size": 47,
        "hidden_size": 16,
        "intermediate_size": 29,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen2.5": {
        "model_type": "qwen2",
        "vocab_size": 67,
        "hidden_size": 24,
        "intermediate_size": 35,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 71,
        "hidden_size": 26,
        "intermediate_size": 39,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 73,
        "hidden_size": 36,
        "intermediate_size": 47,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}

ROWS, TOKENS = 2, 23


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A weight for each name: uniform numbers from a stream that the name alone decides, float32.

    Norms lie around one and biases around zero, both far enough off that leaving one out shows.
    """
    return {name: _weight(name, tuple(shape)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    centred = ((raw >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5).reshape(shape)
    if name.endswith("norm.weight"):
        return (1.0 + centred).astype(np.float32)
    width = 1.0 if len(shape) == 1 else 4.0 / np.sqrt(shape[-1])
    return (centred * width).astype(np.float32)


def token_ids(vocab_size: int) -> np.ndarray:
    """Token ids of a fixed, mixed-up order, int32 (ROWS, TOKENS)."""
    return (np.arange(ROWS * TOKENS) * 37 % vocab_size).reshape(ROWS, TOKENS).astype(np.int32)


def peer(settings: dict[str, Any]) -> Any:
    """The transformers model with these settings and our weights, in float32, ready to run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(name, tuple(parameter.shape))))
    return model


def peer_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """What a transformers model says, float32 (rows, tokens, vocabulary)."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.float().numpy()


def _one_a_line(shapes: dict[str, list[int]]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {shape}" for name, shape in shapes.items()) + "\n}\n"


def main() -> None:
    for family, settings in FAMILIES.items():
        folder = FOLDER / family
        folder.mkdir(parents=True, exist_ok=True)
        model = peer(settings)
        ids = token_ids(settings["vocab_size"])
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (folder / "shapes.json").write_text(_one_a_line(shapes))
        np.savez_compressed(folder / "golden.npz", ids=ids, logits=peer_logits(model, ids))
        print(family, np.abs(peer_logits(model, ids)).max())


if __name__ == "__main__":
    main()
