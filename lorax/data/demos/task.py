"""A demo task, and what always answering the most frequent label would score on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorax.data.examples import Record
from lorax.errors import LoraxError


@dataclass(frozen=True)
class DemoTask:
    """Training and held-out items of one task.

    Attributes:
        name: what it is asked for by.
        train: items to learn from.
        heldout: items to judge by; any first n of them are a fair sample.
        labels: all answers, where the task has a closed list of them.
        description: one line about what is asked and where the data is from.
    """

    name: str
    train: list[Record]
    heldout: list[Record]
    labels: list[str] | None
    description: str


def ask(instruction: str, question: str, answer: str) -> Record:
    """An item of a task. The instruction takes the system turn, where chat templates would otherwise put a
    longer one of their own."""
    turns = ({"role": "system", "content": instruction}, {"role": "user", "content": question})
    return Record(turns, answer)


class Majority(NamedTuple):
    """What knowing the answers' frequencies, and nothing of the question, would score.

    Attributes:
        label: the most frequent training completion.
        accuracy: part of the held-out items with that completion, 0..1.
        loss: nats per completion token, for a predictor that gives each answer its training frequency.
    """

    label: str
    accuracy: float
    loss: float


def majority(train: Sequence[Record], heldout: Sequence[Record], completion_tokens: int) -> Majority:
    """The figures of the majority class.

    The loss is `-sum over held-out items of log p(completion)`, divided by the held-out completion tokens,
    with `p(c) = (count of c in training + 1) / (training items + K)` over the K different completions of
    both parts.

    Args:
        train: training items.
        heldout: held-out items.
        completion_tokens: tokens of all held-out completions, end-of-turn tokens included, as the evaluation
            of a model counts them.

    Raises:
        LoraxError: a part is empty.

    Example:
        >>> a, b = Record("x", "a"), Record("y", "b")
        >>> majority([a, a, b], [a, b], completion_tokens=4).accuracy
        0.5
    """
    if not train or not heldout or completion_tokens < 1:
        raise LoraxError("the majority class needs training items, held-out items and their completion tokens")
    counts = Counter(record.completion for record in train)
    # Ties go to the first in alphabetical order, so that the answer does not hang on the order of the items.
    label = min(counts, key=lambda c: (-counts[c], c))
    kinds = len(set(counts) | {record.completion for record in heldout})
    nats = -sum(math.log((counts[record.completion] + 1) / (len(train) + kinds)) for record in heldout)
    hits = sum(record.completion == label for record in heldout)
    return Majority(label, hits / len(heldout), nats / completion_tokens)
