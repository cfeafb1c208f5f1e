"""Reading a decoder's parameters: one array per kind of weight, filled from the mapped file.

Files keep one tensor per layer, as (out, in); the tree has all layers of a kind in one array (L, in, out). A kind is
filled layer by layer and handed to JAX without a copy before the next is begun, so that loading holds the model once
and a few megabytes. Weights that are to be kept in few bits are packed a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Num

from lorax.choose import choose, is_all_linear, linear_by_name
from lorax.errors import LoraxError
from lorax.io.stored import StoredTensor
from lorax.models import packed
from lorax.models.config import ModelConfig
from lorax.models.hf import Checkpoint, Kind, kinds, open_checkpoint
from lorax.paths import as_patterns
from lorax.quant import QuantSpec

# Buffers that JAX's CPU backend takes over without a copy begin at a multiple of this many bytes.
ALIGNMENT = 64

# In files, but no parameters of the decoder: rotary tables, which the config determines.
DERIVED = ("rotary_emb.inv_freq", "rope_freqs.weight")


def load_params(
    source: Checkpoint | str | Path, config: ModelConfig, dtype: Any, quantize: QuantSpec | None = None
) -> dict[str, Any]:
    """Read all weights into the decoder's parameter tree.

    Args:
        source: a directory, a `.gguf` file, or one that `open_checkpoint` opened.
        config: its config, from `ModelConfig.from_hf`.
        dtype: of the arrays; values are converted while they are copied.
        quantize: keep its targets in few bits; one layer's weight at a time exists in `dtype`.

    Returns:
        A nested dict of JAX arrays; layers stacked in front, kernels (in, out). Weights that the file holds in 4 bits
        are `Quantized`, as are the targets of `quantize`.

    Raises:
        LoraxError: a tensor is missing, has another shape than the config says, is not of real numbers, or
            belongs to no parameter; the message names file and tensor. Nothing is allocated before that is known.
            Or `quantize` asks for another format than the file holds.

    Example:
        source = open_checkpoint("model")
        params = load_params(source, ModelConfig.from_hf(source.config), jnp.bfloat16)
    """
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source)
    table = kinds(config)
    _check(source, table, config)
    chosen = _targets(table, config, dtype, quantize)
    params: dict[str, Any] = {}
    for kind in table:
        _put(params, kind.path, _read(source, kind, config, np.dtype(dtype), quantize if kind.path in chosen else None))
    return params


def _targets(table: list[Kind], config: ModelConfig, dtype: Any, quantize: QuantSpec | None) -> set[str]:
    """The paths that a spec chooses."""
    if quantize is None:
        return set()
    layers = lambda kind: (config.num_layers,) if kind.stacked else ()  # noqa: E731
    named = [(kind.path, jax.ShapeDtypeStruct(layers(kind) + kind.shape, dtype)) for kind in table]
    patterns = as_patterns(quantize.targets)  # pyright: ignore[reportArgumentType]
    chosen = linear_by_name(named) if is_all_linear(patterns) else choose(patterns, named, "quantize.targets")
    for kind in table:
        if kind.path in chosen and len(kind.shape) < 2:
            raise LoraxError(
                f"quantize.targets: {kind.path} is no matrix and stays in {np.dtype(dtype).name}; leave it out"
            )
    return set(chosen)


def _read(source: Checkpoint, kind: Kind, config: ModelConfig, dtype: np.dtype, spec: QuantSpec | None) -> Any:
    """One parameter: in few bits if the file or a spec says so."""
    count = config.num_layers if kind.stacked else 1
    names = [kind.file_name(source.gguf, i) for i in range(count)]
    if any(packed.is_packed(source.tensors, name) for name in names):
        leaf = packed.read_packed(source.tensors, names, kind.path, dtype, kind.stacked)
        if spec is not None and packed.describe(leaf) != spec.describe():
            raise LoraxError(
                f"{source.path}: {kind.path} is kept there as {packed.describe(leaf)}, and {spec.describe()} was asked "
                "for; take what the file has, or the model in 16 bits"
            )
        return leaf
    if spec is None:
        return _read_kind(source, kind, config, dtype)
    layers = read_layers(source, kind, config, dtype, names)
    return packed.pack_layers(layers, kind.path, spec, kind.stacked)


def read_layers(
    source: Checkpoint, kind: Kind, config: ModelConfig, dtype: np.dtype, names: Sequence[str]
) -> Iterator[jax.Array]:
    """The tensors of those names, one of them at a time, as the file has them: (out, in) for a kernel."""
    order = _row_order(source, kind, config)
    return (_read_layer(source.tensors[name], order, dtype) for name in names)


def _read_layer(tensor: StoredTensor, order: np.ndarray | None, dtype: np.dtype) -> jax.Array:
    """One tensor as the file has it, in another dtype, rows in our order."""
    buffer = _aligned(tensor.shape, dtype)
    tensor.copy_to(buffer)
    return jax.device_put(buffer if order is None else buffer[order], may_alias=True)


def _read_kind(source: Checkpoint, kind: Kind, config: ModelConfig, dtype: np.dtype) -> jax.Array:
    buffer = _aligned(((config.num_layers,) if kind.stacked else ()) + kind.shape, dtype)
    order = _row_order(source, kind, config)
    for i in range(config.num_layers if kind.stacked else 1):
        part = buffer[i] if kind.stacked else buffer
        part = part.T if kind.transposed else part
        tensor = source.tensors[kind.file_name(source.gguf, i)]
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

    GGUF files of the architecture "llama" (Mistral's too, not the others) hold the query and key rows of a head with
    feature i next to feature i + head_dim/2, for a rotation of neighbours; ours rotates halves.
    """
    turned = source.gguf and config.family in ("llama", "mistral")
    if not (turned and kind.path.startswith(("layers/attn/q_proj/", "layers/attn/k_proj/"))):
        return None
    return np.arange(kind.shape[-1]).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check(source: Checkpoint, table: list[Kind], config: ModelConfig) -> None:
    """Files and config agree: every parameter is there with its shape, and every tensor is a parameter."""
    claimed = set()
    for kind in table:
        shape = tuple(reversed(kind.shape)) if kind.transposed else kind.shape
        for i in range(config.num_layers if kind.stacked else 1):
            name = kind.file_name(source.gguf, i)
            tensor = source.tensors.get(name)
            if tensor is None:
                raise LoraxError(
                    f"{source.path}: tensor {name!r} is missing; the model is not complete, fetch it again"
                )
            claimed.add(name)
            if packed.is_packed(source.tensors, name):
                packed.check_tensor(source.tensors, name, shape)
                claimed |= packed.beside(source.tensors, name)
                continue
            if tensor.shape != shape:
                raise LoraxError(f"{tensor.path}: tensor {name!r} has shape {tensor.shape}; the config says {shape}")
            if not tensor.floating:
                raise LoraxError(f"{tensor.path}: tensor {name!r} is {tensor.dtype}; lorax reads F64, F32, F16, BF16")
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
