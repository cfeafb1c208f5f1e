"""Batches for evaluation: every example once, one to a row, in few shapes and with little padding.

Exact match without decoding: greedy decoding of a prompt writes exactly the completion (and stops there) if
and only if each completion token, the end of turn included, is the most likely one after the prompt and the
completion tokens before it. The first wrong token would be written instead, and until then decoding and
teacher forcing read the same tokens. So one forward pass over prompt and completion gives the loss and the
exact match: a row matches when the argmax equals `targets` wherever `weights` is above zero. (For a
conversation with several weighted answers: each answer after the true turns before it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lorax.data.examples import Example, Examples
from lorax.data.packing import Batch, assemble
from lorax.data.stream import spread
from lorax.errors import LoraxError


def eval_batches(examples: Iterable[Example], batch_size: int, seq_len: int, group: int = 1) -> Iterator[Batch]:
    """Each example once, longest first, so that rows of a batch are about equally long.

    Every batch has `batch_size` rows, and a width from a short ladder (16, 24, 32, 48, 64, 96, ...), which
    bounds the shapes to compile for. The last batch is filled with empty rows of weight 0.

    Args:
        examples: the held-out set.
        batch_size: B, rows in a batch.
        seq_len: positions that a row may have.
        group: so many examples, one after another, stay together, one to a row; `batch_size` then counts groups.

    Yields:
        Batches as `lorax.data.packing.assemble` makes them, with one more array: `index` (B,) int32, the row's
        place in `examples`, or -1 for an empty row.

    Raises:
        LoraxError: no examples, one is longer than `seq_len`, or a size below 1.

    Example:
        >>> batch, = eval_batches([Example((5, 6), (7, 2)), Example((5,), (9, 2))], batch_size=3, seq_len=8)
        >>> batch["index"].tolist(), batch["weights"].sum()
        ([0, 1, -1], np.float32(4.0))
    """
    many = Examples.of(examples)
    if batch_size < 1 or seq_len < 1:
        raise LoraxError(f"batch_size={batch_size}, seq_len={seq_len}: both must be at least 1")
    if not len(many):
        raise LoraxError("the dataset is empty: there are no examples to evaluate")
    lengths = many.lengths
    if lengths.max() > seq_len:
        raise LoraxError(f"an example takes {lengths.max()} positions and a row has seq_len={seq_len}; raise seq_len")
    return _batches(many, batch_size, seq_len, group)


def _batches(examples: Examples, batch_size: int, seq_len: int, group: int) -> Iterator[Batch]:
    lengths = examples.lengths.reshape(-1, group).max(axis=1)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        index = np.full(batch_size, -1, np.int32)
        index[: len(members)] = members
        rows = spread([[int(i)] if i >= 0 else [] for i in index], group)
        batch = assemble(examples, rows, min(seq_len, bucket(int(lengths[members[0]]))))
        yield batch | {"index": np.array([row[0] if row else -1 for row in rows], np.int32)}


def bucket(length: int) -> int:
    """The least rung of 16, 24, 32, 48, 64, 96, 128, 192, ... that holds `length`.

    Example:
        >>> [bucket(n) for n in (1, 16, 17, 25, 33, 65)]
        [16, 16, 24, 32, 48, 96]
    """
    rung = 16
    while rung < length:
        if rung + rung // 2 >= length:
            return rung + rung // 2
        rung *= 2
    return rung
