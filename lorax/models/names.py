"""One table: where each weight of the decoder stands in a Hugging Face checkpoint and in a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax.models.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """One weight.

    path: in the parameter tree.
    hf, gguf: names in the files; `{i}` is the layer of a stacked weight.
    shape: of one layer, in the tree's order of axes.
    transposed: the files hold (out, in), the tree (in, out).
    rotary_heads: GGUF files of the llama architecture interleave the rotary halves of this many heads.
    """

    path: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    transposed: bool = False
    rotary_heads: int = 0

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


def places(c: ModelConfig) -> list[Place]:
    """Every weight that a config has, in tree order."""
    d, f, hd = c.hidden_size, c.intermediate_size, c.head_dim
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    out = [Place("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", (c.vocab_size, d))]
    out.append(_layer("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight", (d,)))
    for x, n in heads.items():
        turned = n if x != "v" and c.family in ("llama", "mistral") else 0
        names = (f"attn/{x}_proj", f"self_attn.{x}_proj", f"attn_{x}")
        out.append(_layer(f"{names[0]}/kernel", f"{names[1]}.weight", f"{names[2]}.weight", (d, n * hd), True, turned))
        if c.attention_bias:
            out.append(_layer(f"{names[0]}/bias", f"{names[1]}.bias", f"{names[2]}.bias", (n * hd,), False, turned))
        if c.qk_norm and x != "v":
            out.append(_layer(f"attn/{x}_norm/scale", f"self_attn.{x}_norm.weight", f"attn_{x}_norm.weight", (hd,)))
    o_shape = (c.num_heads * hd, d)
    out.append(_layer("attn/o_proj/kernel", "self_attn.o_proj.weight", "attn_output.weight", o_shape, True))
    out.append(_layer("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", (d,)))
    for x, shape in (("gate", (d, f)), ("up", (d, f)), ("down", (f, d))):
        out.append(_layer(f"mlp/{x}_proj/kernel", f"mlp.{x}_proj.weight", f"ffn_{x}.weight", shape, True))
    out.append(Place("norm/scale", "model.norm.weight", "output_norm.weight", (d,)))
    if not c.tie_embeddings:
        out.append(Place("lm_head/kernel", "lm_head.weight", "output.weight", (d, c.vocab_size), True))
    return out


def _layer(path: str, hf: str, gguf: str, *rest: Any) -> Place:
    return Place(f"layers/{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", *rest)
