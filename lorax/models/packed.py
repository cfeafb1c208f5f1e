"""A decoder's weights in few bits: as a checkpoint holds them, or packed layer by layer while they are read.

Both give what `lorax.quantize` gives on the loaded tree, bit for bit, and neither ever holds more than one layer's
weight in 16 or 32 bits: blocks run along the last axis of a tensor as files have it, (out, in) for a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io.stored import StoredTensor
from lorax.quant import Quantized, QuantSpec
from lorax_kernels import nf4
from lorax_kernels.nf4.formats import BLOCK_SIZES

# What stands beside a 4-bit tensor NAME of a checkpoint, as NAME + one of these.
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)

Tensors = Mapping[str, StoredTensor]


def is_packed(tensors: Tensors, name: str) -> bool:
    """Whether a checkpoint holds a weight in 4 bits."""
    return any(name + state in tensors for state in _STATES)


def beside(tensors: Tensors, name: str) -> set[str]:
    """The tensors that belong to a 4-bit weight, without itself."""
    return {name + suffix for suffix in _BESIDE if name + suffix in tensors}


def check_config(settings: Any) -> None:
    """Refuse a `quantization_config` of config.json that is not bitsandbytes in 4 bits.

    Raises:
        LoraxError: says which method it is.
    """
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "bitsandbytes" or not settings.get("load_in_4bit", settings.get("_load_in_4bit", False)):
        kind = f"{method!r}" if method != "bitsandbytes" else "bitsandbytes in 8 bits"
        raise LoraxError(
            f"config.json: weights quantised by {kind} are not served; lorax reads bitsandbytes in 4 bits (nf4, fp4), "
            "and quantises models in 16 or 32 bits itself (quantize=QuantSpec(...), lorax train --method qlora)"
        )


def check_tensor(tensors: Tensors, name: str, shape: tuple[int, ...]) -> None:
    """A 4-bit weight says that it has the shape that the config says; nothing but its description is read.

    Raises:
        LoraxError: names file and tensor.
    """
    state = _state(tensors, name)
    found = state.get("shape")
    if not isinstance(found, list) or tuple(found) != shape:
        raise LoraxError(f"{tensors[name].path}: tensor {name!r} has shape {found}; the config says {shape}")
    if state.get("blocksize") not in BLOCK_SIZES:
        raise LoraxError(
            f"{tensors[name].path}: tensor {name!r} is in blocks of {state.get('blocksize')!r}; "
            f"lorax serves {', '.join(map(str, BLOCK_SIZES))}"
        )


def _state(tensors: Tensors, name: str) -> dict[str, Any]:
    """The JSON that describes a 4-bit weight."""
    key = next(name + state for state in _STATES if name + state in tensors)
    try:
        value = json.loads(tensors[key].array().tobytes())
    except (ValueError, RecursionError) as error:
        raise LoraxError(
            f"{tensors[key].path}: tensor {key!r} is damaged ({str(error)[:80]}); fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise LoraxError(f"{tensors[key].path}: tensor {key!r} is no description of a 4-bit weight; fetch it again")
    return value


def read_packed(tensors: Tensors, names: Sequence[str], path: str, dtype: Any, stacked: bool) -> Quantized:
    """One parameter from the 4-bit tensors of its layers.

    Args:
        tensors: of the checkpoint.
        names: the weight's tensors, one a layer.
        path: in the tree, for messages.
        dtype: of the dequantised values.
        stacked: whether the parameter has an axis of layers.

    Raises:
        LoraxError: a tensor is incomplete, damaged or of another kind than its neighbours; names file and tensor.
    """
    parts = []
    for name in names:
        if not is_packed(tensors, name):
            raise LoraxError(
                f"{tensors[name].path}: tensor {name!r} is not in 4 bits and {names[0]!r} is; all layers of {path} are "
                "kept in one format here: quantise the model from its 16-bit form"
            )
        # Codes may be stored as any dtype of whole bytes; their bytes are what counts.
        given = {key[len(name) + 1 :]: tensors[key].array() for key in sorted(beside(tensors, name))}
        given["weight"] = np.ascontiguousarray(tensors[name].array()).reshape(-1).view(np.uint8)
        try:
            array = nf4.from_bitsandbytes(given)
        except (ValueError, TypeError) as error:
            raise LoraxError(f"{tensors[name].path}: tensor {name!r}: {error}") from None
        parts.append(replace(array, dtype_name=np.dtype(dtype).name))
    return _leaf(parts, path, stacked)


def pack_layers(layers: Iterator[jax.Array], path: str, spec: QuantSpec, stacked: bool) -> Quantized:
    """One parameter, quantised layer by layer.

    Args:
        layers: each layer's weight as files have it, last axis along the blocks; each is dropped before the next.
        path: in the tree, for messages.
        spec: the format.
        stacked: whether the parameter has an axis of layers.

    Raises:
        LoraxError: NaN or infinity in a layer; names path and layer.
    """
    parts = []
    for layer in layers:
        try:
            parts.append(nf4.quantize(layer, spec.block_size, spec.double_quant, spec.format))
        except ValueError as error:
            raise LoraxError(f"{path}{f' (layer {len(parts)})' if stacked else ''}: {error}") from None
        del layer
    return _leaf(parts, path, stacked)


def _leaf(parts: list[nf4.QuantizedArray], path: str, stacked: bool) -> Quantized:
    if len({jax.tree.structure(part) for part in parts}) > 1:
        raise LoraxError(f"{path}: its layers are quantised in different ways; quantise the model from its 16-bit form")
    array = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) if stacked else parts[0]
    array = nf4.for_platform(array, jax.default_backend())
    # Files have kernels as (out, in), the tree as (in, out); an embedding is the same in both.
    return Quantized(array, (1, 0) if path.endswith("kernel") else (0, 1))


def describe(leaf: Quantized) -> str:
    """The format in words, as `QuantSpec.describe` has it."""
    array = leaf.array
    return QuantSpec(array.format, array.scales2 is not None, array.block_size).describe()
