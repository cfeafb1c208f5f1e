"""Texts with a label or a number: what a head on pooled features learns from.

An example's one completion "token" is what the head should say after the prompt: the number of the class or, for a
regression, the bits of a float32. So batches, streams and the loss are those of a language model whose vocabulary is
the labels, and the features that count are those of the prompt's last token (with a chat template: of the header that
opens the answer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lorax.data.chat import encode, last_answer
from lorax.data.examples import Example, Record
from lorax.errors import LoraxError

# More classes than this part of the examples are no classes.
MOST = 0.5


def labels_of(records: Sequence[Record], name: str) -> tuple[str, ...]:
    """The different completions, in alphabetical order.

    Args:
        records: training and held-out ones.
        name: of the data, for the error.

    Raises:
        LoraxError: one alone, or so many that they are no closed list.

    Example:
        >>> labels_of([Record("a", "yes"), Record("b", "no"), Record("c", "no"), Record("d", "yes")], "data")
        ('no', 'yes')
    """
    found = tuple(sorted({record.completion for record in records}))
    if len(found) < 2:
        raise LoraxError(f"{name}: every completion is {', '.join(found)!r}; a classifier needs two labels at least")
    if len(found) > MOST * len(records):
        raise LoraxError(
            f"{name}: {len(found)} different completions in {len(records)} examples are no closed list of labels; "
            "use --head lm, or --head regression for numbers"
        )
    return found


def encode_labelled(record: Record, tokenizer: Any, labels: Sequence[str], regression: bool) -> Example:
    """The prompt's tokens as the model reads them before it answers, and the label.

    Raises:
        LoraxError: the completion is none of the labels, or no number.
    """
    target = number(record) if regression else _class(record, labels)
    return Example(last_answer(encode(record, tokenizer)).prompt_ids, (target,))


def _class(record: Record, labels: Sequence[str]) -> int:
    if record.completion not in labels:
        known = ", ".join(labels[:4])
        raise LoraxError(
            f"{_place(record)}{record.completion!r} is none of the head's {len(labels)} labels ({known}, ...)"
        )
    return labels.index(record.completion)


def number(record: Record) -> int:
    """The completion as the bits of a float32, in an int32.

    Example:
        >>> values([number(Record("a", "2.5"))]).tolist()
        [2.5]
    """
    try:
        value = np.float32(float(record.completion))
    except ValueError:
        value = np.float32(math.nan)
    if not np.isfinite(value):
        raise LoraxError(
            f"{_place(record)}{record.completion[:40]!r} is no finite number, which --head regression predicts"
        )
    return int(value.view(np.int32))


def values(targets: Iterable[int]) -> np.ndarray:
    """The numbers of such bits."""
    return np.array(list(targets), np.int32).view(np.float32)


def _place(record: Record) -> str:
    return f"{record.source}: " if record.source else ""
