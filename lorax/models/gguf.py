"""GGUF files: header, metadata and tensors, memory-mapped, with every claim checked before anything is allocated.

Layout (version 2 and 3, little-endian): magic, version, tensor count, key count; the keys; for each tensor its name,
dimensions (fastest first), type and offset; then the data, each tensor at an aligned offset. Blocks are decoded by the
`gguf` package. Source: the format's description in ggml's repository.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorax.errors import LoraxError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# What the gguf package decodes and we test; others are refused by name.
SERVED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_MAX_ITEMS = 10_000_000
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, not yet read: `load()` decodes it to float32."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    raw: np.ndarray

    def load(self) -> np.ndarray:
        """The values as float32, in numpy's order of axes (slowest first)."""
        return gguf.quants.dequantize(self.raw, self.kind).reshape(self.shape).astype(np.float32, copy=False)


class _Cursor:
    """Reads from mapped bytes and never beyond them."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def take(self, n: int) -> int:
        start = self.at
        if n < 0 or n > len(self.data) - start:
            raise _bad(self.path, f"it ends at byte {len(self.data)} inside the header")
        self.at = start + n
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, smallest: int) -> int:
        """A count of items that each take at least `smallest` bytes: a larger one than fits is a lie."""
        n = self.scalar("<Q")
        if n > min(_MAX_ITEMS, (len(self.data) - self.at) // smallest):
            raise _bad(self.path, f"it claims {n} {what}, more than the file can hold")
        return n

    def string(self) -> str:
        n = self.count("bytes of a string", 1)
        start = self.take(n)
        try:
            return self.data[start : start + n].decode("utf-8")
        except UnicodeDecodeError:
            raise _bad(self.path, f"a string at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _bad(self.path, f"a metadata value has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self.scalar("<I")
        if kind == _STRING:
            return [self.string() for _ in range(self.count("strings", 8))]
        if kind not in _SCALARS:
            raise _bad(self.path, f"an array has the unknown element type {kind}")
        form = _SCALARS[kind]
        size = struct.calcsize(form)
        n = self.count("array elements", size)
        start = self.take(n * size)
        return np.frombuffer(self.data, np.dtype(form.replace("?", "b1")), n, start).tolist()


def _bad(path: Path, why: str) -> LoraxError:
    return LoraxError(f"{path}: not a valid GGUF file: {why}; fetch it again")


class GgufFile(Mapping[str, GgufTensor]):
    """A mapped GGUF file: `metadata` by key, tensors by name.

    Raises:
        LoraxError: the file is missing, truncated, corrupt, or has a tensor type that is not served.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LoraxError(f"{self.path}: cannot be read ({error.strerror}); check the path") from error
        except ValueError:
            raise _bad(self.path, "it is empty") from None
        cursor = _Cursor(self.path, self._map)
        tensors, keys = _preamble(cursor)
        self.metadata = _metadata(cursor, keys)
        self._tensors = _tensors(cursor, tensors, self._alignment())

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise _bad(self.path, f"its alignment is {alignment!r}")
        return alignment

    def __getitem__(self, name: str) -> GgufTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    start = cursor.take(4)
    if cursor.data[start : start + 4] != b"GGUF":
        raise _bad(cursor.path, "it does not begin with 'GGUF'")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise _bad(cursor.path, f"version {version} is not served, only 2 and 3 in little-endian order")
    tensors = cursor.count("tensors", 24)
    return tensors, cursor.count("metadata keys", 13)


def _metadata(cursor: _Cursor, keys: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.string()
        if name in out:
            raise _bad(cursor.path, f"the key {name!r} occurs twice")
        out[name] = cursor.value(cursor.scalar("<I"))
    return out


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    infos = [_tensor_info(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    out: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in out:
            raise _bad(cursor.path, f"the tensor {name!r} occurs twice")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise _bad(cursor.path, f"{name!r} has shape {shape}, which {kind.name} cannot hold")
        row = shape[-1] // block * size
        total = math.prod(shape[:-1]) * row
        if offset % alignment or start + offset + total > len(cursor.data):
            raise _bad(cursor.path, f"the data of {name!r} lies outside the file: it is truncated or corrupt")
        raw = np.frombuffer(cursor.data, np.uint8, total, start + offset).reshape(*shape[:-1], row)
        out[name] = GgufTensor(name, shape, kind, _typed(raw, kind))
    return out


def _typed(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The gguf package wants floats as floats and blocks as bytes."""
    plain = {"F32": np.float32, "F16": np.float16}
    return raw.view(plain[kind.name]) if kind.name in plain else raw


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.string()
    ndim = cursor.scalar("<I")
    if not 1 <= ndim <= _MAX_DIMS:
        raise _bad(cursor.path, f"{name!r} claims {ndim} dimensions")
    shape = tuple(reversed([cursor.scalar("<Q") for _ in range(ndim)]))
    if math.prod(shape) > 1 << 44 or 0 in shape:
        raise _bad(cursor.path, f"{name!r} claims the shape {shape}")
    number = cursor.scalar("<I")
    names = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    if number not in names or names[number].name not in SERVED:
        known = names[number].name if number in names else number
        raise LoraxError(f"{cursor.path}: {name!r} has type {known}, which is not served; served: {', '.join(SERVED)}")
    return name, shape, names[number], cursor.scalar("<Q")


FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The file's metadata in the words of a Hugging Face `config.json`.

    Raises:
        LoraxError: another architecture, or a key that the architecture needs is missing.
    """
    family = file.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise LoraxError(f"{file.path}: architecture {family!r} is not served; lorax reads {', '.join(FAMILIES)}")

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{family}.{key}", default)
        if value is None:
            raise LoraxError(f"{file.path}: lacks the metadata key {family}.{key}; fetch it again")
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise _bad(file.path, f"head_count is {heads!r} and embedding_length {hidden!r}")
    embedding = file.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LoraxError(f"{file.path}: lacks the tensor token_embd.weight; fetch it again")
    config = {
        "model_type": FAMILIES[family],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in file,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if family == "mistral" or f"{family}.attention.sliding_window" in file.metadata:
        config["sliding_window"] = file.metadata.get(f"{family}.attention.sliding_window")
    scaling = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file:
        config["rope_scaling"] = _llama3_scaling(file, config)
    return config


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later store the factors per frequency; the four numbers behind them are read off.

    The converters write `rope_freqs.weight` from the published (low 1, high 4, original 8192) and a factor: the
    largest entry is that factor, and the others are recomputed from it and compared.
    """
    freqs = file.get("rope_freqs.weight")
    if freqs is None:
        raise LoraxError(f"{file.path}: its rope scaling is not served; only Llama 3's (rope_freqs.weight) is")
    have = freqs.load()
    half = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelength = 2 * np.pi * np.float64(config["rope_theta"]) ** half
    factor = float(have.max())
    low, high, original = 1.0, 4.0, 8192
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    want = 1 / ((1 - smooth) / factor + smooth)
    if have.shape != want.shape or not np.allclose(have, want, rtol=1e-3):
        raise LoraxError(f"{file.path}: its rope_freqs.weight is not Llama 3's published scaling, which is not served")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
