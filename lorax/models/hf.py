"""Weights between files and the parameter tree, one kind at a time: at no moment are there two full copies.

A stacked weight is one buffer `(layers, ...)` that is filled layer by layer from the mapped file, handed to JAX and
let go before the next kind is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.atomic import replace_dir, write_json
from lorax.models.config import ModelConfig
from lorax.models.gguf import GgufFile
from lorax.models.names import Place, places

Source = GgufFile | Mapping[str, np.ndarray]

# Names that files carry beside the weights: buffers that the config determines.
_DERIVED = ("rotary_emb.inv_freq", "rope_freqs.weight", "masked_bias", "attn.bias")

MAX_SHARD = 4 << 30


def load_params(source: Source, config: ModelConfig, dtype: Any = jnp.float32, origin: str = "") -> dict[str, Any]:
    """The parameter tree of a config from an open file.

    Args:
        source: a `GgufFile`, or arrays by their Hugging Face names.
        config: the shape that the file must have.
        dtype: of the tree.
        origin: the file or directory, for messages.

    Returns:
        A nested dict of JAX arrays.

    Raises:
        LoraxError: a tensor is missing, has another shape, or belongs nowhere in this config.
    """
    origin = origin or str(getattr(source, "path", "the checkpoint"))
    table = places(config)
    _check_names(source, config, table, origin)
    tree: dict[str, Any] = {}
    for place in table:
        array = _gather(source, config, place, np.dtype(dtype), origin)
        *parents, leaf = place.path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(array)
        # The transfer may still read the buffer; the next kind is read only when it is done.
        node[leaf].block_until_ready()
        del array
    return tree


def _name(source: Source, place: Place) -> str:
    return place.gguf if isinstance(source, GgufFile) else place.hf


def _files_names(source: Source, config: ModelConfig, place: Place) -> Iterator[str]:
    name = _name(source, place)
    layers = range(config.num_layers) if place.stacked else (0,)
    return (name.replace("{i}", str(i)) for i in layers)


def _check_names(source: Source, config: ModelConfig, table: list[Place], origin: str) -> None:
    """A missing tensor is an error, and so is one that nothing would read: it means another architecture."""
    wanted = [name for place in table for name in _files_names(source, config, place)]
    for name in wanted:
        if name not in source:
            raise LoraxError(f"{origin}: lacks the tensor {name!r}, which a {config.family} model of this config needs")
    ignored = {"lm_head.weight", "output.weight"} if config.tie_embeddings else set()
    extra = sorted(set(source) - set(wanted) - ignored)
    extra = [name for name in extra if not name.endswith(_DERIVED)]
    if extra:
        raise LoraxError(
            f"{origin}: holds {extra[0]!r}, which a {config.family} model of this config has no place for; "
            "the config and the weights do not belong together"
        )


def _gather(source: Source, config: ModelConfig, place: Place, dtype: np.dtype, origin: str) -> np.ndarray:
    shape = (config.num_layers, *place.shape) if place.stacked else place.shape
    out = np.empty(shape, dtype)
    for i, name in enumerate(_files_names(source, config, place)):
        x = _read(source, place, name, origin)
        out[i if place.stacked else ...] = x.T if place.transposed else x
    return out


def _read(source: Source, place: Place, name: str, origin: str) -> np.ndarray:
    tensor = source[name]
    want = tuple(reversed(place.shape)) if place.transposed else place.shape
    if tuple(tensor.shape) != want:
        raise LoraxError(f"{origin}: {name!r} has shape {tuple(tensor.shape)}, and the config asks for {want}")
    if isinstance(tensor, np.ndarray):
        if tensor.dtype.kind not in "fV" and tensor.dtype != jnp.bfloat16:
            raise LoraxError(f"{origin}: {name!r} has dtype {tensor.dtype}; only floating weights are served")
        return tensor
    x = tensor.load()
    return _halves(x, place.rotary_heads) if place.rotary_heads else x


def _halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of the rotary pairs: (head, pair, half) back to (head, half, pair) along axis 0."""
    split = x.reshape(heads, -1, 2, *x.shape[1:])
    return np.swapaxes(split, 1, 2).reshape(x.shape)


def save_hf(directory: str | Path, model: Any, params: Any, max_shard: int = MAX_SHARD) -> None:
    """Write a Hugging Face model directory that transformers loads, whole or not at all.

    Args:
        directory: is replaced.
        model: gives `.config` and `.tokenizer`.
        params: the plain (merged) tree; an untied head in it makes the written config untied.
        max_shard: bytes of a file above which the weights are split.

    Raises:
        LoraxError: the tree is not one of this config, or the disk is full.
    """
    config: ModelConfig = model.config
    flat = _flat(params)
    table = places(config)
    shards = _shards(table, config, flat, max_shard)
    with replace_dir(directory) as aside:
        written = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            safetensors.write(aside / file, _Views(names, flat), {"format": "pt"})
            written |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(x.nbytes for x in flat.values())
            index = {"metadata": {"total_size": total}, "weight_map": written}
            write_json(aside / "model.safetensors.index.json", index)
        dtype = jnp.dtype(next(iter(flat.values())).dtype).name
        write_json(aside / "config.json", config.to_hf() | {"dtype": dtype, "torch_dtype": dtype})
        if model.tokenizer is not None:
            model.tokenizer.save(aside)


def _flat(params: Any) -> dict[str, jax.Array]:
    out: dict[str, jax.Array] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                walk(child, f"{path}/{name}" if path else name)
        else:
            out[path] = node

    walk(params, "")
    return out


def _shards(table: list[Place], config: ModelConfig, flat: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """Names of the file's tensors in groups of at most `limit` bytes; each name with its place and layer."""
    have, want = set(flat), {place.path for place in table}
    if have != want:
        odd = sorted(have ^ want)[0]
        raise LoraxError(f"{odd}: is {'missing from' if odd in want else 'too much for'} a tree of this model's config")
    groups: list[dict[str, Any]] = [{}]
    room = limit
    for place in table:
        for i in range(config.num_layers) if place.stacked else (None,):
            size = math.prod(place.shape) * flat[place.path].dtype.itemsize
            if size > room and groups[-1]:
                groups.append({})
                room = limit
            room -= size
            groups[-1][place.hf.replace("{i}", str(i))] = (place, i)
    return groups


class _Views(Mapping[str, np.ndarray]):
    """The tensors of one file, made when they are asked for."""

    def __init__(self, names: dict[str, Any], flat: dict[str, Any]):
        self._names, self._flat = names, flat

    def __getitem__(self, name: str) -> np.ndarray:
        place, layer = self._names[name]
        x = np.asarray(self._flat[place.path])
        x = x if layer is None else x[layer]
        return x.T if place.transposed else x

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
