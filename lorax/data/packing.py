"""Documents into rows: several to a row, none touching another.

A document of n tokens takes n - 1 positions: position t reads token t and predicts token t + 1. Documents lie
side by side in a row; each has its own segment number (1, 2, ...; 0 is padding) and its positions start at 0
again, so that with attention limited to equal segments it is computed as if it were alone. Its last token is
only ever a target, so no target comes from a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lorax.data.examples import Examples

Batch = dict[str, np.ndarray]


def assemble(examples: Examples, rows: Sequence[Sequence[int]], width: int) -> Batch:
    """A batch whose row r holds the documents `rows[r]`, from left to right.

    Args:
        examples: the documents.
        rows: for each row the indices of its documents; an empty row is all padding.
        width: T, positions in a row.

    Returns:
        `ids`, `targets`, `positions`, `segment_ids` (B, T) int32 and `weights` (B, T) float32. Padding is 0 in
        each of them.

    Raises:
        ValueError: the documents of a row are longer than `width` together.
    """
    shape = (len(rows), width)
    batch: Batch = {name: np.zeros(shape, np.int32) for name in ("ids", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for r, members in enumerate(rows):
        begin = 0
        for segment, index in enumerate(members, start=1):
            ids, weights = examples.tokens(index)
            span = slice(begin, begin + len(ids) - 1)
            if span.stop > width:
                raise ValueError(f"documents {list(members)} do not fit in {width} positions")
            batch["ids"][r, span] = ids[:-1]
            batch["targets"][r, span] = ids[1:]
            batch["weights"][r, span] = weights[1:]
            batch["positions"][r, span] = np.arange(len(ids) - 1)
            batch["segment_ids"][r, span] = segment
            begin = span.stop
    return batch


class Filling:
    """A batch of rows that is being filled: each document goes into the first row with room for it.

    Args:
        rows: B, rows of the batch.
        width: T, positions in a row.
        most: documents a row may hold; None for any number.

    Example:
        >>> open = Filling(2, 8)
        >>> [open.put(i, length) for i, length in enumerate((5, 6, 3, 4))]
        [True, True, True, False]
        >>> open.rows
        [[0, 2], [1]]
    """

    def __init__(self, rows: int, width: int, most: int | None = None) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._room = [width] * rows
        self._most = most

    def put(self, index: int, length: int) -> bool:
        """Take a document of `length` positions; False, with nothing changed, if no row has room."""
        for r, room in enumerate(self._room):
            if length <= room and (self._most is None or len(self.rows[r]) < self._most):
                self.rows[r].append(index)
                self._room[r] -= length
                return True
        return False


def count_batches(lengths: Iterable[int], rows: int, width: int) -> float:
    """How many packed batches one pass over documents of these lengths makes, the last one as a fraction."""
    full, done, held = 0, 0, 0
    filling = Filling(rows, width)
    for length in lengths:
        if not filling.put(0, length):
            full, done, held = full + 1, done + held, 0
            filling = Filling(rows, width)
            filling.put(0, length)
        held += length
    return full + held / (done / full if full else rows * width)
