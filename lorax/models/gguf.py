"""GGUF files: their tensors, mapped and decoded on demand, and their metadata as a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Float, UInt8

from lorax.errors import LoraxError
from lorax.io.stored import MappedFile, StoredTensor
from lorax.models.gguf_header import Header, TensorInfo, parse_header

PLAIN: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
TYPES = {int(kind): kind for kind in GGMLQuantizationType if kind.name in (*PLAIN, *BLOCKS)}

FAMILIES = ("llama", "qwen2", "qwen3")

# What every published Llama 3 uses beside the factor; the file keeps only the resulting divisors.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor], dict[str, Any]]:
    """Open a GGUF file.

    Returns:
        config: what `config.json` would hold, for `ModelConfig.from_hf`.
        tensors: by GGUF name ("blk.0.attn_q.weight"), shaped as Hugging Face has them: (out, in).
        metadata: the file's own keys.

    Raises:
        LoraxError: the file is missing, cut off or damaged, in a storage type or of an architecture that lorax
            does not read.

    Example:
        config, tensors, metadata = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
        tensors["token_embd.weight"].array()   # (49152, 576) float32
    """
    tensors, metadata = read_tensors(path)
    return hf_config(Path(path), metadata, tensors), tensors, metadata


def read_tensors(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Tensors and metadata of any GGUF file, whatever its architecture.

    Raises:
        LoraxError: as `read_gguf`, but for the architecture.
    """
    file = MappedFile(Path(path))
    header = parse_header(file.path, file.bytes)
    parts = header.metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise LoraxError(f"{path}: one of several parts; join them into one file first (llama-gguf-split --merge)")
    _check_apart(file, header)
    tensors = {info.name: _tensor(file, header, info) for info in header.tensors}
    if len(tensors) != len(header.tensors):
        raise LoraxError(f"{path}: two tensors share a name; the file is damaged, fetch it again")
    return tensors, header.metadata


def _tensor(file: MappedFile, header: Header, info: TensorInfo) -> StoredTensor:
    kind = _kind(file.path, info)
    start = header.data + info.offset
    decode = partial(_decode, kind=kind)
    return StoredTensor(info.name, info.shape, kind.name, file, start, start + _nbytes(kind, info), decode, True)


def _kind(path: Path, info: TensorInfo) -> GGMLQuantizationType:
    kind = TYPES.get(info.type)
    if kind is None:
        known = {int(k): k.name for k in GGMLQuantizationType}.get(info.type, f"number {info.type}")
        raise LoraxError(
            f"{path}: tensor {info.name[:80]!r}: type {known} is not read; {', '.join((*PLAIN, *BLOCKS))} are"
        )
    block, _ = GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block:
        raise LoraxError(
            f"{path}: tensor {info.name[:80]!r}: its rows of {info.shape[-1]} do not divide into {kind.name}'s "
            f"blocks of {block}; the file is damaged, fetch it again"
        )
    return kind


def _nbytes(kind: GGMLQuantizationType, info: TensorInfo) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(info.shape) // block * size


def _check_apart(file: MappedFile, header: Header) -> None:
    """Every tensor lies inside the file and begins after the one before it ends."""
    before, at = "", 0
    for info in sorted(header.tensors, key=lambda info: info.offset):
        if info.offset < at:
            raise LoraxError(
                f"{file.path}: tensors {before[:80]!r} and {info.name[:80]!r} overlap; the file is damaged, "
                "fetch it again"
            )
        before, at = info.name, info.offset + _nbytes(_kind(file.path, info), info)
        if header.data + at > file.bytes.size:
            raise LoraxError(
                f"{file.path}: tensor {info.name[:80]!r} ends at byte {header.data + at} of {file.bytes.size}; "
                "the file is cut off, fetch it again"
            )


def _decode(rows: UInt8[np.ndarray, "rows bytes"], kind: GGMLQuantizationType) -> Float[np.ndarray, "rows columns"]:
    if kind.name in PLAIN:
        return rows.view(PLAIN[kind.name])
    with np.errstate(all="ignore"):  # damaged scales are not finite; the loss will say so
        return dequantize(rows, kind)


def hf_config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The Hugging Face config that GGUF metadata and tensor shapes amount to.

    Raises:
        LoraxError: another architecture, a key that is missing, or a rope scaling other than Llama 3's.
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise LoraxError(f"{path}: architecture {str(family)[:40]!r} is not served; lorax reads {FAMILIES}")
    if "token_embd.weight" not in tensors:
        raise LoraxError(f"{path}: tensor 'token_embd.weight' is missing; the file is no language model")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{family}.{key}", default)
        if value is None:
            raise LoraxError(f"{path}: key '{family}.{key}' is missing; the file is not a complete model")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LoraxError(f"{path}: key '{family}.{key}' must be one number, not {str(value)[:40]!r}")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    theta = get("rope.freq_base", 10000.0)
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads if heads else 0))
    if get("attention.value_length", head_dim) != head_dim or get("rope.dimension_count", head_dim) != head_dim:
        raise LoraxError(f"{path}: keys, values and rotary features of different sizes are not served")
    window = _window(path, metadata, family)
    return {
        # Mistral's files say "llama": the arithmetic is the same but for the window.
        "model_type": "mistral" if window and family == "llama" else family,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "attention_bias": family == "qwen2" or "blk.0.attn_q.bias" in tensors,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(path, metadata, tensors, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": get("context_length"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _window(path: Path, metadata: Mapping[str, Any], family: str) -> int | None:
    """The sliding window of all layers. Converters leave it out where they leave it unused: then all is seen."""
    window = metadata.get(f"{family}.attention.sliding_window", 0)
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise LoraxError(
            f"{path}: key '{family}.attention.sliding_window' must be one number, not {str(window)[:40]!r}"
        )
    if window and f"{family}.attention.sliding_window_pattern" in metadata:
        raise LoraxError(f"{path}: a sliding window in some of the layers is not served; only one in all of them is")
    return window or None


def _shortest(value: float) -> float:
    """The decimal that was meant: float32 of 1e-5 is 9.999999747378752e-06 in float64."""
    return float(str(np.float32(value)))


def _rope_scaling(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Llama 3's scaling, recognised by the divisors of the frequencies that the file holds."""
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    if not isinstance(kind, str) or kind != "none":
        raise LoraxError(f"{path}: rope scaling {str(kind)[:40]!r} is not served; only Llama 3's is")
    stored = tensors.get("rope_freqs.weight")
    if stored is None:
        return None
    divisors = np.array(stored.array(), np.float64).reshape(-1)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3_ROPE}
    with np.errstate(all="ignore"):  # no number is refused here but by not being equal
        same = 2 * divisors.size == head_dim and np.allclose(
            divisors, _llama3_divisors(scaling, float(theta), head_dim), rtol=1e-3
        )
    if not same:
        raise LoraxError(f"{path}: tensor 'rope_freqs.weight' is not Llama 3's scaling of the rotary frequencies")
    return scaling if scaling["factor"] != 1.0 else None


def _llama3_divisors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Float[np.ndarray, " half"]:
    """What each rotary frequency is divided by: 1 for fast ones, `factor` for slow ones, a blend between.

    Source: the Llama 3.1 model card's reference rope.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling["factor"] + kept)
