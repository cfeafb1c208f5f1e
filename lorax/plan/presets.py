"""Bases by name, or from any Hugging Face `config.json`: nothing but numbers is read, no weight is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from lorax.errors import LoraxError
from lorax.models import ModelConfig
from lorax.models.hub import from_hub

_LLAMA3 = {"norm_eps": 1e-5, "rope_theta": 500000.0, "max_length": 131072}


def _llama(
    vocab: int, d: int, f: int, layers: int, heads: int, kv: int, head: int = 128, **more: object
) -> ModelConfig:
    return ModelConfig("llama", vocab, d, f, layers, heads, kv, head, **more)  # pyright: ignore[reportArgumentType]


def _qwen3(d: int, f: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    more = {"rope_theta": 1e6, "tie_embeddings": tied, "qk_norm": True, "max_length": 40960}
    return ModelConfig("qwen3", 151936, d, f, layers, heads, 8, 128, **more)  # pyright: ignore[reportArgumentType]


# Source: the config.json of each published model.
PRESETS: dict[str, ModelConfig] = {
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama-3.1-70b": _llama(128256, 8192, 28672, 80, 64, 8, **_LLAMA3),
    "llama-3.1-405b": _llama(128256, 16384, 53248, 126, 128, 8, **_LLAMA3),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True, **_LLAMA3),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, tie_embeddings=True, **_LLAMA3),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, max_length=4096),
    "llama-65b": _llama(32000, 8192, 22016, 80, 64, 64, max_length=2048),
    "mistral-7b": ModelConfig("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e6, max_length=32768),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 64, tie_embeddings=True, rope_theta=1e5, max_length=8192),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, 5, 64, tie_embeddings=True, rope_theta=1e5, max_length=8192),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, 64, tie_embeddings=True, rope_theta=1.3e5, max_length=8192),
}


def config_of(name: str) -> ModelConfig:
    """The shape of a base.

    Args:
        name: a preset, a `config.json`, a directory that holds one, or `hf:org/name`, of which that file alone is
            fetched (with the `hub` extra).

    Raises:
        LoraxError: nothing of that name; lists the presets.

    Example:
        >>> config_of("llama-3.1-70b").num_layers
        80
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = from_hub(name[3:], "config.json") if name.startswith("hf:") else Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not name or not file.is_file():
        raise LoraxError(
            f"--base {name or 'of no name'}: no such preset and no config.json; give a Hugging Face config.json, "
            f"hf:org/name, or one of {', '.join(PRESETS)}"
        )
    try:
        return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise LoraxError(f"{file}: is no JSON ({str(error)[:80]}); point at a Hugging Face config.json") from None
