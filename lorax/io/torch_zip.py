"""Tensors out of a file of `torch.save`, without torch and without running what is in it.

    a zip archive, nothing compressed:   NAME/data.pkl      a pickled mapping of names to tensors
                                         NAME/data/0, ...   the bytes of each storage

Releases of PEFT before 0.7 wrote adapters so (`adapter_model.bin`). A pickle is a program. Here it may build mappings
and say "a tensor of this storage, shape and stride", and nothing else: any other name in it is an error, so a file from
a stranger can at worst be refused.

Source: the format's description in PyTorch's `torch/serialization.py` and its notes on serialization semantics.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax.errors import LoraxError
from lorax.io.safetensors import DTYPES, FLOATING, MAX_DIMENSIONS, MAX_HEADER
from lorax.io.stored import MappedFile, StoredTensor

STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}


class _Storage(NamedTuple):
    dtype: str
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Kind(NamedTuple):
    """The class of a storage, as the pickle names it."""

    dtype: str


def read(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a file, mapped; nothing but their description is read yet.

    Raises:
        LoraxError: the file is missing, cut off, or holds anything but a mapping of names to plain tensors.

    Example:
        read("adapter/adapter_model.bin")["base_model.model.lm_head.weight"].array()
    """
    file = MappedFile(Path(path))
    try:
        with zipfile.ZipFile(path) as archive:
            places = {info.filename.partition("/")[2]: _place(file, info) for info in archive.infolist()}
            start, stop = places["data.pkl"]
            order = places.get("byteorder")
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, struct.error, OSError):
        raise LoraxError(
            f"{path}: is no archive of torch.save (torch 1.6 or newer); save the adapter as safetensors"
        ) from None
    if stop - start > MAX_HEADER:
        raise LoraxError(f"{path}: describes its tensors in {stop - start} bytes, which is too much to be true")
    if order is not None and file.bytes[slice(*order)].tobytes() != b"little":
        raise LoraxError(f"{path}: was saved on a machine of another byte order; save the adapter as safetensors")
    value = _unpickled(Path(path), file.bytes[start:stop].tobytes())
    return {name: _stored(file, name, tensor, places) for name, tensor in value.items()}


def _place(file: MappedFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes lie in the file."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile
    head = file.bytes[info.header_offset : info.header_offset + 30].tobytes()
    name, extra = struct.unpack("<HH", head[26:30])
    start = info.header_offset + 30 + name + extra
    if head[:4] != b"PK\x03\x04" or start + info.file_size > file.bytes.size:
        raise zipfile.BadZipFile
    return start, start + info.file_size


class _Reader(pickle.Unpickler):
    """Builds mappings and descriptions of tensors; knows no other names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return _Kind(STORAGES[name])
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, count = pid
        if what != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of another kind")
        return _Storage(kind.dtype, key, count)


def _unpickled(path: Path, data: bytes) -> dict[str, _Tensor]:
    try:
        value = _Reader(io.BytesIO(data)).load()
    except Exception as error:
        # A pickle from elsewhere can go wrong in as many ways as there are exceptions.
        raise LoraxError(
            f"{path}: holds something else than plain tensors ({str(error)[:80]}); save the adapter as safetensors"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in value.items()):
        raise LoraxError(f"{path}: holds something else than named tensors; save the adapter as safetensors")
    return value


def _stored(file: MappedFile, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]) -> StoredTensor:
    storage, offset, shape, stride = tensor
    sizes = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (-1,)
    place = places.get(f"data/{storage.key}") if isinstance(storage, _Storage) else None
    if place is None or len(sizes) > 2 * MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in sizes):
        raise LoraxError(f"{file.path}: tensor {name[:100]!r} is malformed; the file is damaged, fetch it again")
    dtype = DTYPES[storage.dtype]
    count = math.prod(shape)
    begin = place[0] + offset * dtype.itemsize
    if begin + count * dtype.itemsize > place[1] or len(shape) != len(stride):
        raise LoraxError(f"{file.path}: tensor {name[:100]!r} reaches beyond its bytes; the file is damaged")
    if not _row_major(shape, stride):
        raise LoraxError(
            f"{file.path}: tensor {name[:100]!r} is a view of another one; save the adapter as safetensors"
        )

    def decode(rows: np.ndarray) -> np.ndarray:
        return rows.view(dtype)

    end = begin + count * dtype.itemsize
    return StoredTensor(name, shape, storage.dtype, file, begin, end, decode, storage.dtype in FLOATING)


def _row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
