"""Quantised weights in a Hugging Face directory, as bitsandbytes' checkpoints have them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io.safetensors import Entry
from lorax.models.hf import Kind
from lorax.quant import Quantized
from lorax_kernels.nf4.bitsandbytes import to_checkpoint
from lorax_kernels.nf4.codebooks import FOUR_BIT


def check(kind: Kind, leaf: Quantized) -> None:
    """Refuse what such a checkpoint cannot hold.

    Raises:
        LoraxError: names the weight and the way out.
    """
    way_out = "save the tree that lorax.dequantize gives"
    if leaf.array.format not in FOUR_BIT:
        raise LoraxError(
            f"{kind.path}: Hugging Face checkpoints hold nf4 and fp4, not {leaf.array.format} as it is here; {way_out}"
        )
    if not kind.transposed or leaf.order != (1, 0):
        raise LoraxError(f"{kind.path}: Hugging Face checkpoints hold linear layers in 4 bits, nothing else; {way_out}")


def entries(kind: Kind, leaf: Quantized, layer: int | None) -> list[Entry]:
    """The tensors of one layer's weight; values are made when their turn comes."""
    name = kind.hf.format(layer)

    # One layer at a time is taken out of the stack: its tensors are written one after the other.
    @functools.lru_cache(maxsize=1)
    def tensors() -> dict[str, np.ndarray]:
        array = leaf.array if layer is None else jax.tree.map(lambda x: x[layer], leaf.array)
        return to_checkpoint(array)

    shapes = {key: (value.shape, value.dtype) for key, value in tensors().items()}
    tensors.cache_clear()

    def make(key: str) -> np.ndarray:
        value = tensors()[key]
        if key == last:
            tensors.cache_clear()
        return value

    last = list(shapes)[-1]
    return [
        Entry(f"{name}.{key}" if key else name, shape, dtype, functools.partial(make, key))
        for key, (shape, dtype) in shapes.items()
    ]


def config(flat: dict[str, Any], table: list[Kind]) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty for a tree without quantised weights.

    Raises:
        LoraxError: weights in several formats.
    """
    packed = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Quantized)}
    if not packed:
        return {}
    kinds = {(leaf.array.format, leaf.array.scales2 is not None, leaf.array.block_size) for leaf in packed.values()}
    if len(kinds) > 1:
        raise LoraxError(
            f"{min(packed)}: a Hugging Face checkpoint has one 4-bit format, and the tree has {len(kinds)}; "
            "quantise all weights alike"
        )
    ((format, double_quant, _),) = kinds
    dtype = jnp.dtype(next(iter(packed.values())).dtype).name
    plain = [kind.hf.removesuffix(".weight") for kind in table if kind.transposed and kind.path not in packed]
    # transformers compares whole names or their ends; a tied head is named too, and is never quantised.
    skip = {name.rsplit("{}.", 1)[-1] for name in plain} | ({"lm_head"} - {"lm_head" for p in packed if "lm_head" in p})
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(skip),
    }
    return {"quantization_config": settings}
