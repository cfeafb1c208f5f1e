"""Safetensors files: a reader that believes nothing, and a writer that holds one tensor at a time.

    8 bytes: length n of the header, little-endian | n bytes: JSON | the tensors' bytes, end to end

    header: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}

A file is accepted only if each tensor's offsets agree with its shape and dtype, and the tensors fill the data
without gap or overlap: then no header can make a reader allocate more than the file holds.

Source: https://huggingface.co/docs/safetensors (the format's description).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lorax.errors import LoraxError
from lorax.io.atomic import open_new
from lorax.io.stored import MappedFile, StoredTensor

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})

# The format's own limit on the header, in bytes.
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what the header says of it, and how to make its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def read(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one file, mapped; nothing but the header is read yet.

    Raises:
        LoraxError: the file is missing, cut off or not what its header says; the message names the tensor.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "w.safetensors"
        >>> write_arrays(path, {"w": np.arange(3, dtype=np.float32)})
        >>> read(path)["w"].array().tolist()
        [0.0, 1.0, 2.0]
    """
    file = MappedFile(Path(path))
    header, data = _header(file)
    fields = {name: _field(file.path, name, value) for name, value in header.items() if name != "__metadata__"}
    _check_cover(file.path, {name: field[2] for name, field in fields.items()}, file.bytes.size - data)
    return {
        name: StoredTensor(
            name, shape, dtype, file, data + begin, data + end, _view_as(DTYPES[dtype]), dtype in FLOATING
        )
        for name, (dtype, shape, (begin, end)) in fields.items()
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings that a file's writer left in it.

    Raises:
        LoraxError: as `read`.
    """
    return _header(MappedFile(Path(path)))[0].get("__metadata__", {})


def read_sharded(index: str | Path) -> dict[str, StoredTensor]:
    """The tensors of several files, by an index (`model.safetensors.index.json`) that says which holds which.

    Raises:
        LoraxError: the index is malformed, names a file outside its directory, or a tensor that is not there.
    """
    index = Path(index)
    names = read_json(index, "it says which file holds which tensor").get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(v, str) for v in names.values())):
        raise LoraxError(f"{index}: not an index of safetensors files (no weight_map); fetch it again")
    shards = {shard: read(_inside(index, shard)) for shard in sorted(set(names.values()))}
    for name, shard in names.items():
        if name not in shards[shard]:
            raise LoraxError(f"{index.parent / shard}: lacks tensor {name!r}, which {index.name} places there")
    return {name: shards[shard][name] for name, shard in names.items()}


def read_json(path: str | Path, purpose: str) -> dict[str, Any]:
    """A JSON object from a file that stands beside the weights.

    Raises:
        LoraxError: the file is missing (the message adds `purpose`) or is not one JSON object in UTF-8.
    """
    try:
        value = _loads(Path(path).read_bytes())
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror}); {purpose}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        raise LoraxError(f"{path}: not valid JSON ({reason}); fetch it again") from None
    if not isinstance(value, dict):
        raise LoraxError(f"{path}: not a JSON object; fetch it again")
    return value


def write(path: str | Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, making one tensor at a time.

    Raises:
        LoraxError: the system refuses (disk full); a file that was there is untouched.
        ValueError: two entries share a name, or one makes another shape or dtype than it said.
    """
    entries = list(entries)
    with open_new(path) as file:
        file.write(_header_bytes(entries, metadata))
        for entry in entries:
            array = np.asarray(entry.make(), order="C")
            if array.shape != tuple(entry.shape) or array.dtype != np.dtype(entry.dtype):
                raise ValueError(f"{entry.name}: made {array.shape} {array.dtype}, said {entry.shape} {entry.dtype}")
            file.write(array.reshape(-1).view(np.uint8).data)


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """`write` of arrays that are in memory already."""
    write(path, [Entry(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()], metadata)


def _header_bytes(entries: list[Entry], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors are named {entry.name!r}")
        dtype = NAMES[np.dtype(entry.dtype)]
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned for every dtype
    return len(text).to_bytes(8, "little") + text


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data starts."""
    size = file.bytes.size
    if size < 8:
        raise LoraxError(f"{file.path}: {size} bytes are too few for a safetensors file; it is cut off, fetch it again")
    length = int.from_bytes(file.bytes[:8].tobytes(), "little")
    if length > min(MAX_HEADER, size - 8):
        raise LoraxError(
            f"{file.path}: the header claims {length} bytes of a file of {size}; it is cut off or not safetensors"
        )
    try:
        header = _loads(file.bytes[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
        raise LoraxError(f"{file.path}: the safetensors header is not valid JSON ({reason}); fetch it again") from None
    if not isinstance(header, dict):
        raise LoraxError(f"{file.path}: the safetensors header is not a JSON object; fetch it again")
    notes = header.get("__metadata__", {})
    if not (isinstance(notes, dict) and all(isinstance(v, str) for v in notes.values())):
        raise LoraxError(f"{file.path}: __metadata__ in the safetensors header must map strings to strings")
    return header, 8 + length


def _field(path: Path, name: str, value: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and offsets of one tensor, which agree with each other."""

    def wrong(what: str) -> LoraxError:
        return LoraxError(f"{path}: tensor {name[:80]!r}: {what}; the file is damaged, fetch it again")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("its header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise LoraxError(f"{path}: tensor {name[:80]!r}: dtype {str(dtype)[:40]!r} is not served; only {list(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(map(_is_size, shape))):
        raise wrong(f"shape {str(shape)[:80]} is not a short list of sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        raise wrong(f"data_offsets {str(offsets)[:80]} are not two positions")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise wrong(f"data_offsets [{begin}, {end}] do not fit {dtype} {shape}")
    if math.prod(filter(None, shape)) * DTYPES[dtype].itemsize >= 2**63:
        raise wrong(f"shape {str(shape)[:80]} is empty along one axis and beyond any array along the others")
    return dtype, tuple(shape), (begin, end)


def _check_cover(path: Path, offsets: dict[str, tuple[int, int]], size: int) -> None:
    """The tensors follow each other without gap or overlap and end where the file ends."""
    at = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise LoraxError(f"{path}: tensor {name[:80]!r} {what}; the file is damaged, fetch it again")
        if end > size:
            raise LoraxError(
                f"{path}: tensor {name[:80]!r} ends at byte {end} of {size}; the file is cut off, fetch it again"
            )
        at = end
    if at != size:
        raise LoraxError(f"{path}: {size - at} bytes belong to no tensor; the file is damaged, fetch it again")


def _loads(data: bytes) -> Any:
    """JSON in UTF-8, without repeated keys and without NaN. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a name appears twice")
        return out

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _view_as(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows.view(dtype)


def _inside(index: Path, shard: str) -> Path:
    if shard != Path(shard).name or shard in ("", ".", ".."):
        raise LoraxError(f"{index}: file {shard!r} is not a plain name beside the index")
    return index.parent / shard
