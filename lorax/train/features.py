"""Features of a trunk in which nothing trains: computed once, kept on disk, so that an epoch costs the head alone.

Only positions that the loss counts are kept: `(counted positions, d)` float32 for the training and the held-out part.
The files lie in lorax's cache folder under a name made of everything that decides them, so a second run over the same
base and data (another learning rate, another seed) computes none, and a resumed run reads the very same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lorax.data import Examples, TrainStream, eval_batches
from lorax.io.atomic import replace_dir

# Sets of features that stay in the cache.
KEPT = 8

Batch = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """The features of some examples.

    values: (counted positions, d), all examples one after another.
    examples: the examples.
    starts: (n + 1,); example i has `values[starts[i]:starts[i + 1]]`.
    """

    values: Float[np.ndarray, "counted d"]
    examples: Examples
    starts: np.ndarray

    @property
    def widest(self) -> int:
        """Counted positions of the example that has most."""
        return int(np.diff(self.starts).max())

    def batch(self, rows: list[list[int]], width: int) -> Batch:
        """A batch whose row r holds the counted positions of the examples `rows[r]`.

        Returns:
            `features` (B, width, d), `targets`, `weights` and `segment_ids` (B, width), zero where nothing counts.
        """
        shape = (len(rows), width)
        out: Batch = {"features": np.zeros((*shape, self.values.shape[1]), self.values.dtype)}
        out |= {"targets": np.zeros(shape, np.int32), "weights": np.zeros(shape, np.float32)}
        out["segment_ids"] = np.zeros(shape, np.int32)
        for r, members in enumerate(rows):
            at = 0
            for segment, i in enumerate(members, start=1):
                ids, weights = self.examples.tokens(i)
                counted = np.flatnonzero(weights[1:] > 0) + 1
                span = slice(at, at + len(counted))
                out["features"][r, span] = self.values[self.starts[i] : self.starts[i + 1]]
                out["targets"][r, span], out["weights"][r, span] = ids[counted], weights[counted]
                out["segment_ids"][r, span] = segment
                at = span.stop
        return out


class FeatureStream(Iterator[Batch]):
    """A training stream's batches with features in the place of tokens: the same examples in the same order."""

    def __init__(self, stream: TrainStream, features: Features):
        self._stream, self._features = stream, features
        # Rows that are packed hold any number of examples.
        self._width = stream.width if stream.pack else features.widest

    @property
    def batches_per_epoch(self) -> float:
        return self._stream.batches_per_epoch

    def __next__(self) -> Batch:
        return self._features.batch(self._stream.next_rows(), self._width)

    def state(self) -> dict[str, Any]:
        """As of the stream."""
        return self._stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        """As of the stream."""
        self._stream.restore(state)


@dataclass(frozen=True)
class HeldOutFeatures:
    """Held-out examples by their features; stands where `HeldOut` stood."""

    features: Features
    batch_size: int

    def __len__(self) -> int:
        return len(self.features.examples)

    def batches(self) -> Iterator[Batch]:
        """Batches in a fixed order, each example once."""
        for start in range(0, len(self), self.batch_size):
            members = range(start, min(start + self.batch_size, len(self)))
            rows = [[i] for i in members] + [[] for _ in range(self.batch_size - len(members))]
            yield self.features.batch(rows, self.features.widest)


def cached(
    model: Any,
    parts: dict[str, Examples],
    key: dict[str, Any],
    place: Path,
    *,
    batch_size: int,
    seq_len: int,
    tick: Callable[[str, int], None] = lambda part, rows: None,
) -> dict[str, Features]:
    """The features of each part, from the cache or computed into it.

    Args:
        model: with `.hidden` and the trunk's `.params`.
        parts: examples by name.
        key: what else decides the values (hashes of the base and the data, the dtype).
        place: the folder of the cache.
        batch_size, seq_len: of the forward passes.
        tick: told of each batch: the part and how many examples it had.

    Raises:
        LoraxError: the disk is full.
    """
    about = key | {"jax": jax.__version__, "batch_size": batch_size, "seq_len": seq_len, "parts": sorted(parts)}
    folder = place / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    starts = {name: _starts(examples) for name, examples in parts.items()}
    if not all((folder / f"{name}.npy").is_file() for name in parts):
        with replace_dir(folder) as new:
            for name, examples in parts.items():
                _compute(model, examples, starts[name], new / f"{name}.npy", batch_size, seq_len, name, tick)
        _forget(place, folder)
    os.utime(folder)
    return {
        name: Features(np.load(folder / f"{name}.npy", mmap_mode="r"), examples, starts[name])
        for name, examples in parts.items()
    }


def _starts(examples: Examples) -> np.ndarray:
    counted = np.concatenate([[0], np.cumsum(examples.weights > 0)])
    return counted[examples.starts]


def _compute(
    model: Any,
    examples: Examples,
    starts: np.ndarray,
    file: Path,
    batch_size: int,
    seq_len: int,
    name: str,
    tick: Callable[[str, int], None],
) -> None:
    """One part's file, filled batch by batch: the whole need not fit in memory."""
    from lorax import lift

    # A quantised trunk goes through lift; a plain one does, too, at no cost.
    hidden = jax.jit(lift(model.hidden))
    size = model.config.hidden_size
    values = np.lib.format.open_memmap(file, "w+", np.float32, (int(starts[-1]), size))
    for batch in eval_batches(examples, batch_size, seq_len):
        found = np.asarray(hidden(model.params, batch["ids"], batch["positions"], batch["segment_ids"]), np.float32)
        for row, weights, i in zip(found, batch["weights"], batch["index"], strict=True):
            if i >= 0:
                values[starts[i] : starts[i + 1]] = row[weights > 0]
        tick(name, int((batch["index"] >= 0).sum()))
    values.flush()


def _forget(place: Path, but: Path) -> None:
    """Drop the sets that were not used for longest."""
    found = sorted((p for p in place.iterdir() if p.is_dir() and p != but), key=lambda p: p.stat().st_mtime)
    for folder in found[: max(0, len(found) - KEPT + 1)]:
        shutil.rmtree(folder, ignore_errors=True)
