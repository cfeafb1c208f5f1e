"""Training batches without end, that can be stopped anywhere and continued to the same bit.

grain decides the order (a new shuffle each epoch, all from one seed) and keeps the place in it. Rows are
filled in that order until a document fits in none; that document begins the next batch. The place that is
saved is the one before it, so nothing but grain's own state has to be kept, even in the middle of a pack.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np

from lorax.data.examples import Example, Examples, data_hash
from lorax.data.packing import Batch, Filling, assemble, count_batches
from lorax.errors import LoraxError

_ROUND = 8
_UNREADABLE = "the saved data position cannot be read; start the run again"


class TrainStream(Iterator[Batch]):
    """Endless batches of one fixed shape `(batch_size, width)`, so that a training step compiles once.

    Args:
        examples: the training set.
        batch_size: B, rows in a batch.
        seq_len: positions that a row may have. A packed row has exactly so many; without packing `width` is
            the longest example, rounded up to a multiple of 8.
        seed: decides the order of every epoch.
        pack: several examples to a row (see `lorax.data.packing`), or one.
        group: so many examples, one after another, stay together in a batch, one to a row: the two answers of a
            preference. `batch_size` then counts groups, and nothing is packed.

    Attributes:
        width: T, positions in a row.
        rows: the rows to fill in, None for all B. A process of many sets it to those that its devices hold; the order
            and the place in it are the same whatever it is.
        batches_per_epoch: batches that one pass takes; exact without packing, otherwise that of the first pass.

    Raises:
        LoraxError: no examples, one does not fit in a row, or a size below 1.

    Example:
        >>> stream = TrainStream([Example((5, 6), (7, 2)), Example((5,), (9, 2))], batch_size=2, seq_len=8)
        >>> first, place = next(stream), stream.state()
        >>> second = next(stream)
        >>> stream.restore(place)
        >>> bool((next(stream)["ids"] == second["ids"]).all())
        True
    """

    def __init__(
        self,
        examples: Iterable[Example],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        pack: bool = False,
        group: int = 1,
    ) -> None:
        self.examples = Examples.of(examples)
        _check(self.examples, batch_size, seq_len)
        if group > 1 and (pack or len(self.examples) % group):
            raise LoraxError(f"examples that stay together in {group}s are not packed, and come in whole groups")
        # The length of a group is that of its longest.
        self._lengths = self.examples.lengths.reshape(-1, group).max(axis=1).tolist()
        self.batch_size = batch_size
        self.pack, self.group = pack, group
        self.rows: slice | None = None
        self.width = seq_len if pack else min(seq_len, -(-max(self._lengths) // _ROUND) * _ROUND)
        # Any integer may be a seed; grain takes 32 bits of it.
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._about = {
            "data": data_hash(self.examples),
            "batch_size": batch_size,
            "seq_len": seq_len,
            "seed": seed,
            "pack": pack,
            **({"group": group} if group > 1 else {}),
        }
        # Reading happens in this process and this thread: an index costs nothing to make.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        order = grain.MapDataset.source(range(len(self._lengths))).seed(self._seed).shuffle()
        self._order = order
        self._places = iter(order.repeat().to_iter_dataset(options))
        self._pending: int | None = None
        self._before: Any = self._places.get_state()

    @property
    def batches_per_epoch(self) -> float:
        if not self.pack:
            return len(self._lengths) / self.batch_size
        lengths = (self._lengths[int(self._order[i])] for i in range(len(self._lengths)))  # type: ignore[arg-type]
        return count_batches(lengths, self.batch_size, self.width)

    def __next__(self) -> Batch:
        return assemble(self.examples, self.next_rows()[self.rows or slice(None)], self.width)

    def next_rows(self) -> list[list[int]]:
        """The next batch as the examples of each row."""
        filling = Filling(self.batch_size, self.width, most=None if self.pack else 1)
        while True:
            if self._pending is None:
                self._before = self._places.get_state()
                self._pending = int(next(self._places))
            if not filling.put(self._pending, self._lengths[self._pending]):
                return spread(filling.rows, self.group)
            self._pending = None

    def state(self) -> dict[str, Any]:
        """The place after the last batch, as JSON values."""
        return json.loads(json.dumps({"order": self._before, **self._about}))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a place that `state` gave, in this process or another.

        Raises:
            LoraxError: the place belongs to other data or other settings; names which.
        """
        if not isinstance(state, dict) or "order" not in state:
            raise LoraxError(_UNREADABLE)
        for name, value in self._about.items():
            if state.get(name) != value:
                raise LoraxError(
                    f"the saved data position has {name}={state.get(name)!r} but the stream has {value!r}; "
                    f"resume with the data and settings that the run began with"
                )
        try:
            self._places.set_state(state["order"])
        except (TypeError, KeyError, ValueError) as error:
            raise LoraxError(_UNREADABLE) from error
        self._before, self._pending = state["order"], None


def spread(rows: list[list[int]], group: int) -> list[list[int]]:
    """Rows of groups as rows of examples, each on its own where there are groups.

    Example:
        >>> spread([[3], [0]], 2), spread([[3, 1]], 1)
        ([[6], [7], [0], [1]], [[3, 1]])
    """
    if group == 1:
        return rows
    return [[i * group + j] if (i := row[0] if row else -1) >= 0 else [] for row in rows for j in range(group)]


def _check(examples: Examples, batch_size: int, seq_len: int) -> None:
    if not len(examples):
        raise LoraxError("the dataset is empty: there are no examples to train on")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise LoraxError(f"{name} is {value}: must be at least 1")
    longest = int(examples.lengths.max())
    if longest > seq_len:
        raise LoraxError(
            f"an example takes {longest} positions and a row has seq_len={seq_len}; "
            f"raise seq_len or let lorax.data.encode_all drop long examples"
        )
