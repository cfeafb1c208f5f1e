"""`load`: a base model by name, ready to call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.models import tokenizer, tokenizer_gguf
from lorax.models.config import ModelConfig
from lorax.models.gguf import GgufFile, hf_config
from lorax.models.hf import load_params
from lorax.models.model import Model
from lorax.models.resolve import resolve_base


def load(path_or_name: str | os.PathLike[str], dtype: Any = jnp.float32, remat: bool = False) -> Model:
    """A base model: its weights, its config and its tokenizer.

    Args:
        path_or_name: a Hugging Face directory, a .gguf file, `hf:org/name`, or the built-in name `smollm2-135m`.
        dtype: of the weights, and so of the arithmetic.
        remat: recompute each layer in the backward pass.

    Returns:
        A `Model`; its `.params` is a plain nested dict.

    Raises:
        LoraxError: nothing of that name, a file that is damaged, or another architecture.

    Example:
        >>> from lorax.models import load
        >>> load("no/such/base")
        Traceback (most recent call last):
        ...
        lorax.errors.LoraxError: no/such/base: no such base; name a directory, a .gguf file, hf:org/name, ...
    """
    path = resolve_base(path_or_name)
    return _from_gguf(path, dtype, remat) if path.is_file() else _from_directory(path, dtype, remat)


def _from_gguf(path: Path, dtype: Any, remat: bool) -> Model:
    file = GgufFile(path)
    config = ModelConfig.from_hf(hf_config(file))
    tok = tokenizer_gguf.from_metadata(file.metadata, path)
    return Model(config, load_params(file, config, dtype, str(path)), tok, remat)


def _from_directory(path: Path, dtype: Any, remat: bool) -> Model:
    config_path = path / "config.json"
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraxError(f"{config_path}: is missing; point at the directory of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoraxError(f"{config_path}: cannot be read as JSON ({str(error)[:80]})") from error
    config = ModelConfig.from_hf(raw)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    source = safetensors.read_sharded(index) if index.exists() and not single.exists() else safetensors.read(single)
    tok = tokenizer.from_directory(path) if (path / "tokenizer.json").exists() else None
    return Model(config, load_params(source, config, dtype, str(path)), tok, remat)
