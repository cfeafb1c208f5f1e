"""Weights in and out: the names that Hugging Face and GGUF give to the decoder's parameters.

Both keep one tensor per layer, as (out, in). Here all layers of a kind are one array (L, in, out). A kind is
filled layer by layer from the mapped file and handed to JAX without a copy before the next is begun, so that
loading holds the model once and a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Num

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.stored import StoredTensor
from lorax.models.config import ModelConfig
from lorax.models.gguf import read_gguf

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Buffers that JAX's CPU backend takes over without a copy begin at a multiple of this many bytes.
ALIGNMENT = 64

# In files, but no parameters of the decoder: rotary tables, which the config determines.
DERIVED = ("rotary_emb.inv_freq", "rope_freqs.weight")


@dataclass(frozen=True)
class Kind:
    """One array of the parameter tree and its tensors in files.

    path: where in the tree, with "/" between keys.
    hf, gguf: names in files; "{}" stands for the layer.
    shape: of one layer's part in the tree (without the axis of layers).
    """

    path: str
    hf: str
    gguf: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def transposed(self) -> bool:
        return self.path.endswith("kernel")


def kinds(config: ModelConfig) -> list[Kind]:
    """All parameters of a decoder, in the order of the computation.

    Example:
        >>> config = ModelConfig("llama", 11, 8, 12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> kinds(config)[0]
        Kind(path='embed/embedding', hf='model.embed_tokens.weight', gguf='token_embd.weight', shape=(11, 8))
    """
    c = config
    d, heads, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    out = [Kind("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", (c.vocab_size, d))]
    out.append(_layer("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight", d))
    for name, width in (("q", heads), ("k", kv), ("v", kv)):
        at = f"attn/{name}_proj/", f"self_attn.{name}_proj.", f"attn_{name}."
        out.append(_layer(at[0] + "kernel", at[1] + "weight", at[2] + "weight", d, width))
        if c.attention_bias:
            out.append(_layer(at[0] + "bias", at[1] + "bias", at[2] + "bias", width))
    if c.qk_norm:
        out += [
            _layer(f"attn/{n}_norm/scale", f"self_attn.{n}_norm.weight", f"attn_{n}_norm.weight", c.head_dim)
            for n in "qk"
        ]
    out.append(_layer("attn/o_proj/kernel", "self_attn.o_proj.weight", "attn_output.weight", heads, d))
    out.append(_layer("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", d))
    f = c.intermediate_size
    for name, sizes in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
        out.append(_layer(f"mlp/{name}_proj/kernel", f"mlp.{name}_proj.weight", f"ffn_{name}.weight", *sizes))
    out.append(Kind("norm/scale", "model.norm.weight", "output_norm.weight", (d,)))
    if not c.tie_embeddings:
        out.append(Kind("lm_head/kernel", "lm_head.weight", "output.weight", (d, c.vocab_size)))
    return out


def _layer(path: str, hf: str, gguf: str, *shape: int) -> Kind:
    return Kind(f"layers/{path}", f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", shape)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its config, its tensors by their names in the file, and the file's own metadata.

    gguf: whether the names are GGUF's; then llama's query and key rows are in GGUF's order.
    metadata: GGUF's keys, among them the tokenizer; empty for a directory.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]
    gguf: bool


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory or a `.gguf` file; no weight is read yet.

    Raises:
        LoraxError: something is missing, damaged or not served; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, _read_config(path / "config.json"), _read_directory(path), {}, False)
    config, tensors, metadata = read_gguf(path)
    return Checkpoint(path, config, tensors, metadata, True)


def load_params(source: Checkpoint | str | Path, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Read all weights into the decoder's parameter tree.

    Args:
        source: a directory, a `.gguf` file, or one that `open_checkpoint` opened.
        config: its config, from `ModelConfig.from_hf`.
        dtype: of the arrays; values are converted while they are copied.

    Returns:
        A nested dict of JAX arrays; layers stacked in front, kernels (in, out).

    Raises:
        LoraxError: a tensor is missing, has another shape than the config says, is not of real numbers, or
            belongs to no parameter; the message names file and tensor. Nothing is allocated before that is known.

    Example:
        source = open_checkpoint("model")
        params = load_params(source, ModelConfig.from_hf(source.config), jnp.bfloat16)
    """
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source)
    table = kinds(config)
    _check(source, table, config)
    params: dict[str, Any] = {}
    for kind in table:
        _put(params, kind.path, _read_kind(source, kind, config, np.dtype(dtype)))
    return params


def _read_kind(source: Checkpoint, kind: Kind, config: ModelConfig, dtype: np.dtype) -> jax.Array:
    buffer = _aligned(((config.num_layers,) if kind.stacked else ()) + kind.shape, dtype)
    order = _row_order(source, kind, config)
    for i in range(config.num_layers if kind.stacked else 1):
        part = buffer[i] if kind.stacked else buffer
        part = part.T if kind.transposed else part
        tensor = source.tensors[(kind.gguf if source.gguf else kind.hf).format(i)]
        if order is None:
            tensor.copy_to(part)
        else:
            plain = np.empty(tensor.shape, dtype)
            tensor.copy_to(plain)
            part[...] = plain[order]
    # Nothing else refers to the buffer, so the array may own it; on an accelerator this waits for the copy.
    return jax.device_put(buffer, may_alias=True).block_until_ready()


def _row_order(source: Checkpoint, kind: Kind, config: ModelConfig) -> np.ndarray | None:
    """Which row of the file is row i of ours; None if they are the same.

    GGUF files of the architecture "llama" (not of the others) hold the query and key rows of a head with
    feature i next to feature i + head_dim/2, for a rotation of neighbours; ours rotates halves.
    """
    if not (source.gguf and config.family == "llama" and kind.path.endswith(("q_proj/kernel", "k_proj/kernel"))):
        return None
    return np.arange(kind.shape[-1]).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check(source: Checkpoint, table: list[Kind], config: ModelConfig) -> None:
    """Files and config agree: every parameter is there with its shape, and every tensor is a parameter."""
    claimed = set()
    for kind in table:
        shape = tuple(reversed(kind.shape)) if kind.transposed else kind.shape
        for i in range(config.num_layers if kind.stacked else 1):
            name = (kind.gguf if source.gguf else kind.hf).format(i)
            tensor = source.tensors.get(name)
            if tensor is None:
                raise LoraxError(
                    f"{source.path}: tensor {name!r} is missing; the model is not complete, fetch it again"
                )
            if tensor.shape != shape:
                raise LoraxError(f"{tensor.path}: tensor {name!r} has shape {tensor.shape}; the config says {shape}")
            if not tensor.floating:
                raise LoraxError(f"{tensor.path}: tensor {name!r} is {tensor.dtype}; lorax reads F64, F32, F16, BF16")
            claimed.add(name)
    # A tied model's file may repeat the embedding as the head.
    claimed |= {"lm_head.weight"} if config.tie_embeddings else set()
    spare = sorted(name for name in source.tensors if name not in claimed and not name.endswith(DERIVED))
    if spare:
        raise LoraxError(
            f"{source.path}: tensor {spare[0]!r} ({len(spare)} such) is no parameter of a {config.family} decoder of "
            f"{config.num_layers} layers; lorax cannot compute what it would add"
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> Num[np.ndarray, ...]:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _read_config(path: Path) -> dict[str, Any]:
    return safetensors.read_json(path, "a Hugging Face model's directory has one")


def _read_directory(path: Path) -> Mapping[str, StoredTensor]:
    if (path / INDEX).is_file():
        return safetensors.read_sharded(path / INDEX)
    if (path / SINGLE).is_file():
        return safetensors.read(path / SINGLE)
    if list(path.glob("*.bin")) or list(path.glob("*.pth")):
        raise LoraxError(f"{path}: holds pickled weights, which lorax does not open; save them as safetensors first")
    raise LoraxError(f"{path}: holds neither {SINGLE} nor {INDEX}")
