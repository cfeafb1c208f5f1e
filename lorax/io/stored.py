"""A tensor that is still on the disk: its name, its shape, and rows on demand.

Files are mapped into memory, so reading touches only the pages that are asked for, and `copy_to` gives the
pages back as soon as they are copied: a loader needs its own copy of the weights and a few megabytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Num, Shaped, UInt8

from lorax.errors import LoraxError

# Decoded bytes held at a time while a tensor is copied row by row.
CHUNK_BYTES = 4 << 20

Decode = Callable[[np.ndarray], np.ndarray]


class MappedFile:
    """A whole file as read-only bytes, by the kernel's page cache."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise LoraxError(f"{path}: the file is empty; fetch it again") from None
        except OSError as error:
            raise LoraxError(f"{path}: cannot be read ({error.strerror or error})") from None
        self.bytes: UInt8[np.ndarray, " size"] = np.frombuffer(self._map, np.uint8)

    def release(self, start: int, stop: int) -> None:
        """Let go of the pages of bytes [start, stop) in this process; they are read again when needed."""
        if hasattr(self._map, "madvise"):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a mapped file.

    name: as the file has it.
    shape: of the decoded values, outermost axis first.
    dtype: the storage type as the file calls it ("F32", "BF16", "Q4_1").
    start, stop: the bytes of the file that hold it; rows (the last axis) follow each other in equal lengths.
    decode: bytes (rows, row_bytes) uint8 -> values (rows, shape[-1]), row by row independent.
    floating: whether the values are real numbers, as weights are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: MappedFile
    start: int
    stop: int
    decode: Decode
    floating: bool

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.file.path

    def array(self) -> Shaped[np.ndarray, ...]:
        """The whole tensor, decoded: a copy in memory for quantised types, else a view of the mapped file."""
        return self.decode(self._rows()).reshape(self.shape)

    def copy_to(self, out: Num[np.ndarray, "*shape"]) -> None:
        """Decode into an array of the same shape, which may be a transposed view and of another dtype.

        Raises:
            LoraxError: the tensor has another shape than `out`.
        """
        if out.shape != self.shape:
            raise LoraxError(f"{self.path}: tensor {self.name!r} has shape {self.shape}, not {out.shape}")
        if out.ndim > 2:
            np.copyto(out, self.array(), casting="unsafe")
        else:
            self._copy_rows(out[None] if out.ndim == 1 else out.reshape(1, 1) if out.ndim == 0 else out)
        self.file.release(self.start, self.stop)

    def _copy_rows(self, out: np.ndarray) -> None:
        rows = self._rows()
        step = max(1, CHUNK_BYTES // max(1, 4 * out.shape[1]))
        for at in range(0, out.shape[0], step):
            np.copyto(out[at : at + step], self.decode(rows[at : at + step]), casting="unsafe")

    def _rows(self) -> UInt8[np.ndarray, "rows row_bytes"]:
        count = int(np.prod(self.shape[:-1], dtype=np.int64)) if self.shape else 1
        width = (self.stop - self.start) // count if count else 0
        return self.file.bytes[self.start : self.stop].reshape(count, width)
