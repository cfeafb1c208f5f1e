"""`load`: a base model by name, ready to call."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from lorax.models import tokenizer, tokenizer_gguf
from lorax.models.config import ModelConfig
from lorax.models.hf import open_checkpoint
from lorax.models.model import Model
from lorax.models.read import load_params
from lorax.models.resolve import resolve_base
from lorax.quant import QuantSpec


def load(
    path_or_name: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    remat: bool = False,
    quantize: QuantSpec | None = None,
) -> Model:
    """A base model: its weights, its config and its tokenizer.

    Args:
        path_or_name: a Hugging Face directory, a .gguf file, `hf:org/name`, or the built-in name `smollm2-135m`.
        dtype: of the weights, and so of the arithmetic.
        remat: recompute each layer in the backward pass.
        quantize: keep weights in few bits; they are packed while they are read, layer by layer.

    Returns:
        A `Model`; its `.params` is a plain nested dict. `.tokenizer` is None for a directory without one. With
        quantised weights (of `quantize`, or of a checkpoint saved in 4 bits) its functions go through `lorax.lift`.

    Raises:
        LoraxError: nothing of that name, a file that is damaged, another architecture or quantisation.

    Example:
        >>> from lorax import LoraxError
        >>> from lorax.models import load
        >>> try:
        ...     load("no/such/base")
        ... except LoraxError as error:
        ...     print(str(error)[:27])
        no/such/base: no such base;
    """
    source = open_checkpoint(resolve_base(path_or_name))
    config = ModelConfig.from_hf(source.config)
    params = load_params(source, config, dtype, quantize)
    if source.gguf:
        text = tokenizer_gguf.from_metadata(dict(source.metadata), source.path)
    else:
        text = tokenizer.from_directory(source.path) if (source.path / "tokenizer.json").exists() else None
    return Model(config, params, text, remat)
