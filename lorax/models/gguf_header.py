"""The head of a GGUF file, parsed with a bound on everything: a count or a length that the file is too short
for is an error before anything is allocated for it.

    "GGUF" | version u32 | tensors u64 | keys u64
    keys:    name | type u32 | value            (strings: length u64, bytes; arrays: type u32, count u64, items)
    tensors: name | dimensions u32 | sizes u64..., innermost first | storage type u32 | offset u64
    padding to `general.alignment` | the tensors' bytes, each at its offset from here

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the format's description).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUFValueType
from jaxtyping import UInt8

from lorax.errors import LoraxError

NUMBERS: dict[int, np.dtype] = {
    int(GGUFValueType.UINT8): np.dtype("<u1"),
    int(GGUFValueType.INT8): np.dtype("<i1"),
    int(GGUFValueType.UINT16): np.dtype("<u2"),
    int(GGUFValueType.INT16): np.dtype("<i2"),
    int(GGUFValueType.UINT32): np.dtype("<u4"),
    int(GGUFValueType.INT32): np.dtype("<i4"),
    int(GGUFValueType.FLOAT32): np.dtype("<f4"),
    int(GGUFValueType.BOOL): np.dtype("?"),
    int(GGUFValueType.UINT64): np.dtype("<u8"),
    int(GGUFValueType.INT64): np.dtype("<i8"),
    int(GGUFValueType.FLOAT64): np.dtype("<f8"),
}
STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NESTING = 3
MAX_ALIGNMENT = 1 << 20


class TensorInfo(NamedTuple):
    """Where a tensor is said to be. shape: outermost axis first; type: ggml's number; offset: from `Header.data`."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class Header(NamedTuple):
    """metadata: numbers, strings, lists of strings, numpy arrays of numbers. data: the byte where the data starts."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data: int


def parse_header(path: Path, data: UInt8[np.ndarray, " size"]) -> Header:
    """Parse the head of a file whose bytes are `data`.

    Raises:
        LoraxError: another format or version, or a head that does not fit the file.
    """
    cursor = _Cursor(path, data)
    if cursor.number("<I", "the magic") != GGUF_MAGIC:
        raise LoraxError(f"{path}: not a GGUF file (its first bytes are not 'GGUF')")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        raise LoraxError(f"{path}: GGUF version {version} is not served; only little-endian versions {VERSIONS} are")
    # A tensor's entry takes at least 24 bytes, a key's 13.
    tensors = cursor.count(24, "the number of tensors")
    keys = cursor.count(13, "the number of keys")
    metadata: dict[str, Any] = {}
    for i in range(keys):
        name = cursor.string(f"the name of key {i}")
        if name in metadata:
            raise cursor.wrong(f"key {name[:80]!r} appears twice")
        metadata[name] = cursor.value(cursor.number("<I", f"the type of {name[:80]!r}"), f"key {name[:80]!r}")
    infos = [_tensor(cursor, i) for i in range(tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    valid = isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not valid:
        raise cursor.wrong(f"general.alignment is {str(alignment)[:40]}, not a power of two")
    return Header(metadata, infos, math.ceil(cursor.at / alignment) * alignment)


def _tensor(cursor: _Cursor, i: int) -> TensorInfo:
    name = cursor.string(f"the name of tensor {i}")
    what = f"tensor {name[:80]!r}"
    dimensions = cursor.number("<I", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.wrong(f"{what} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    sizes = [cursor.number("<Q", what) for _ in range(dimensions)]
    if any(size < 1 for size in sizes):
        raise cursor.wrong(f"{what} has an axis of no length: {sizes}")
    return TensorInfo(name, tuple(reversed(sizes)), cursor.number("<I", what), cursor.number("<Q", what))


class _Cursor:
    """A place in the file that only moves forward and never past the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data.data, 0

    def wrong(self, what: str) -> LoraxError:
        return LoraxError(f"{self.path}: {what}; the file is cut off or damaged, fetch it again")

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.at:
            raise self.wrong(f"{what} needs {size} bytes at byte {self.at}, and {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str, what: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def count(self, least: int, what: str) -> int:
        """How many things of at least `least` bytes each follow."""
        count = self.number("<Q", what)
        if count * least > len(self.data) - self.at:
            raise self.wrong(f"{what} is {count}, for which {len(self.data) - self.at} bytes are too few")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.number("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            # Vocabularies may hold pieces of characters; a name that is not text matches nothing later.
            return str(raw, "utf-8", errors="replace")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in NUMBERS:
            dtype = NUMBERS[kind]
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY or depth == MAX_NESTING:
            raise self.wrong(f"{what} has a value of type {kind}, which GGUF does not have here")
        items = self.number("<I", what)
        size = f"the length of {what}"
        if items in NUMBERS:
            dtype = NUMBERS[items]
            return np.frombuffer(self.take(self.count(dtype.itemsize, size) * dtype.itemsize, what), dtype)
        return [self.value(items, what, depth + 1) for _ in range(self.count(8, size))]
