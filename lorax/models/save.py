"""`save_hf`: a model as a Hugging Face directory that transformers loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.atomic import replace_dir, write_json
from lorax.models import save_packed
from lorax.models.config import ModelConfig
from lorax.models.hf import INDEX, SINGLE, Kind, kinds
from lorax.quant import Quantized

# Bytes of one file above which the weights are split.
MAX_SHARD = 4 << 30


def save_hf(directory: str | Path, model: Any, params: Any, max_shard: int = MAX_SHARD) -> None:
    """Write config, weights and tokenizer, whole or not at all; one tensor at a time is copied.

    Args:
        directory: is replaced.
        model: gives `.config` and `.tokenizer` (None leaves the tokenizer's files out).
        params: the plain (merged) tree of that config; quantised kernels become a bitsandbytes 4-bit checkpoint.
        max_shard: bytes of a file above which the weights are split, with an index beside them.

    Raises:
        LoraxError: the tree is not one of this config, or the place cannot be written; what was there stays.

    Example:
        save_hf("runs/medical/model", model, lorax.merge(adapted))
    """
    config: ModelConfig = model.config
    flat = _flat(params)
    _check(config, flat)
    quantised = save_packed.config(flat, kinds(config))
    shards = _shards(_tensors(config, flat), max_shard)
    with replace_dir(directory) as aside:
        where: dict[str, str] = {}
        for number, entries in enumerate(shards, 1):
            several = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE
            safetensors.write(aside / file, entries, {"format": "pt"})
            where |= {entry.name: file for entry in entries}
        if len(shards) > 1:
            total = sum(entry.nbytes for entries in shards for entry in entries)
            write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        dtype = jnp.dtype(flat["embed/embedding"].dtype).name
        write_json(aside / "config.json", config.to_hf() | _padding(model) | {"torch_dtype": dtype} | quantised)
        if model.tokenizer is not None:
            model.tokenizer.save(aside)


def _padding(model: Any) -> dict[str, Any]:
    """The token of padding, by which transformers finds the last token of a text that is to be classified."""
    pad = None if model.tokenizer is None else model.tokenizer.pad_id
    return {"pad_token_id": pad} if model.config.labels and pad is not None else {}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    out: dict[str, Any] = {}
    for name, child in tree.items():
        out |= _flat(child, f"{path}/{name}" if path else name)
    return out


def _check(config: ModelConfig, flat: dict[str, Any]) -> None:
    table = {kind.path: kind for kind in kinds(config)}
    for path in sorted(table.keys() ^ flat.keys()):
        raise LoraxError(f"{path}: is {'missing from' if path in table else 'too much for'} a tree of this config")
    for path, kind in table.items():
        want = ((config.num_layers,) if kind.stacked else ()) + kind.shape
        if tuple(flat[path].shape) != want:
            raise LoraxError(f"{path}: has shape {tuple(flat[path].shape)}, and the config says {want}")
        if isinstance(flat[path], Quantized):
            save_packed.check(kind, flat[path])


def _tensors(config: ModelConfig, flat: dict[str, Any]) -> list[safetensors.Entry]:
    out = []
    for kind in kinds(config):
        shape = tuple(reversed(kind.shape)) if kind.transposed else kind.shape
        whole = flat[kind.path]
        for i in range(config.num_layers) if kind.stacked else (None,):
            if isinstance(whole, Quantized):
                out += save_packed.entries(kind, whole, i)
                continue
            name, dtype = kind.hf.format(i), np.dtype(whole.dtype)
            out.append(safetensors.Entry(name, shape, dtype, lambda w=whole, k=kind, i=i: _one(w, k, i)))
    return out


def _one(whole: jax.Array, kind: Kind, layer: int | None) -> np.ndarray:
    # The whole array is a view on CPU; elsewhere one layer is fetched at a time.
    x = np.asarray(whole if layer is None else whole[layer])
    return x.T if kind.transposed else x


def _shards(entries: list[safetensors.Entry], limit: int) -> list[list[safetensors.Entry]]:
    shards: list[list[safetensors.Entry]] = [[]]
    room = limit
    for entry in entries:
        size = math.prod(entry.shape) * np.dtype(entry.dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= size
    return shards
