"""The names that Hugging Face and GGUF give to the decoder's parameters, and opening their files.

Both keep one tensor per layer, as (out, in). Here all layers of a kind are one array (L, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.stored import StoredTensor
from lorax.models.config import ModelConfig
from lorax.models.gguf import read_gguf

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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

    def file_name(self, gguf: bool, layer: int = 0) -> str:
        """The tensor of a layer."""
        return (self.gguf if gguf else self.hf).format(layer)

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
    if c.output_bias:
        out.append(_layer("attn/o_proj/bias", "self_attn.o_proj.bias", "attn_output.bias", d))
    out.append(_layer("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", d))
    f = c.intermediate_size
    for name, sizes in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
        out.append(_layer(f"mlp/{name}_proj/kernel", f"mlp.{name}_proj.weight", f"ffn_{name}.weight", *sizes))
    out.append(Kind("norm/scale", "model.norm.weight", "output_norm.weight", (d,)))
    if c.labels:
        out.append(Kind("score/kernel", "score.weight", "score.weight", (d, len(c.labels))))
    elif not c.tie_embeddings:
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
