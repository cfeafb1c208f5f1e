"""What a run reads: a training stream, a held-out set, and what the majority class would score on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax.data import (
    Example,
    Examples,
    Jsonl,
    Record,
    TrainStream,
    data_hash,
    demo,
    encode,
    encode_all,
    eval_batches,
    majority,
)
from lorax.data.demos.split import held_out as falls_out
from lorax.data.labelled import encode_labelled, labels_of, values
from lorax.data.preferences import encode_pairs, of_task, preferences
from lorax.errors import LoraxError
from lorax.train.config import TrainConfig

# The part of a user's file that is held out when no --eval-data is given.
HELD_OUT = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """Examples to judge by, each evaluated alone in its row.

    Attributes:
        name: where they are from.
        examples: as tokens.
        records: the same as text.
        batch_size: rows in a batch.
        seq_len: longest row.
    """

    name: str
    examples: Examples
    records: list[Record]
    batch_size: int
    seq_len: int
    group: int = 1

    def __len__(self) -> int:
        return len(self.examples) // self.group

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches in a fixed order, each example once."""
        return eval_batches(self.examples, self.batch_size, self.seq_len, self.group)

    @property
    def completion_tokens(self) -> int:
        """Tokens that an evaluation counts."""
        return int((self.examples.weights > 0).sum())


@dataclass(frozen=True)
class Dataset:
    """The data of a run.

    Attributes:
        name: what the report calls it.
        train: training examples as tokens.
        held_out: what is evaluated.
        majority: accuracy, loss and label of what knows the answers' frequencies alone.
        sha256: of both parts; a resumed run must find the same.
        labels: what a classifier is to tell apart; empty for text.
        group: examples that stay together: 2 where they are pairs of answers.
    """

    name: str
    train: Examples
    held_out: HeldOut
    majority: dict[str, Any]
    sha256: str
    labels: tuple[str, ...] = ()
    group: int = 1

    def stream(self, config: TrainConfig) -> TrainStream:
        """Micro-batches without end, from the beginning."""
        c = config
        return TrainStream(self.train, c.batch_size, c.seq_len, seed=c.seed, pack=c.pack, group=self.group)

    @property
    def text(self) -> np.ndarray:
        """Tokens of the training part, one after another, int32; without labels, which are none."""
        if not self.labels:
            return self.train.ids
        return np.concatenate([np.asarray(example.prompt_ids, np.int32) for example in self.train])


def prepare(config: TrainConfig, tokenizer: Any, say: Say, labels: tuple[str, ...] = ()) -> Dataset:
    """Read, split and tokenize what `config` names.

    Args:
        config: `task`, `data`, `eval_data`, `eval_items`, `seq_len`, `batch_size`, `head` and `loss` are read.
        tokenizer: the base model's.
        say: told of what the user should know: dropped examples, a part held out.
        labels: those of the head that the base has; by default the data's.

    Raises:
        LoraxError: a malformed line (file and line), an empty set, too few examples to hold some out, a label that the
            head does not have.
    """
    _need(tokenizer)
    if config.loss == "dpo":
        return _pairs(config, tokenizer, say)
    name, train, rest = _records(config, say)
    if config.head != "lm":
        return _labelled(config, tokenizer, say, labels, (name, train, rest))
    examples = encode_all(train, tokenizer, seq_len=config.seq_len, say=say)
    held_out = _fitting(
        name, rest, lambda record: encode(record, tokenizer), config.eval_items, config.batch_size, config.seq_len
    )
    most = majority(train, held_out.records, held_out.completion_tokens)
    digest = data_hash([*examples, *held_out.examples])
    return Dataset(name, examples, held_out, most._asdict(), digest)


def _pairs(config: TrainConfig, tokenizer: Any, say: Say) -> Dataset:
    """Preferences. Knowing nothing, one prefers the right answer half of the time."""
    if config.task:
        task = demo(config.task)
        name, train, rest = task.name, of_task(task, task.train), of_task(task, task.heldout)
    else:
        name = str(config.data)
        train = preferences(name)
        rest = preferences(config.eval_data) if config.eval_data else []
        if not rest:
            train, rest = _hold_out(name, train, say)
    examples, _ = encode_pairs(train, tokenizer, seq_len=config.seq_len, say=say)
    other, kept = encode_pairs(rest[: config.eval_items], tokenizer, seq_len=config.seq_len)
    records = [pair.records()[0] for pair in kept]
    held = HeldOut(name, other, records, config.batch_size, config.seq_len, group=2)
    coin = {"label": "either", "accuracy": 0.5, "loss": math.log(2)}
    return Dataset(name, examples, held, coin, data_hash([*examples, *other]), group=2)


def _labelled(
    config: TrainConfig,
    tokenizer: Any,
    say: Say,
    labels: tuple[str, ...],
    records: tuple[str, list[Record], list[Record]],
) -> Dataset:
    """Texts with classes or numbers."""
    name, train, rest = records
    numbers = config.head == "regression"
    if not labels:
        closed = demo(config.task).labels if config.task else None
        labels = ("value",) if numbers else tuple(closed or labels_of([*train, *rest], name))
    encoded = [encode_labelled(record, tokenizer, labels, numbers) for record in train]
    fits = [len(example.ids) - 1 <= config.seq_len for example in encoded]
    if not any(fits):
        raise LoraxError(f"{name}: no example fits into {config.seq_len} tokens; raise --seq-len")
    if not all(fits):
        say(f"dropped {fits.count(False)} of {len(fits)} examples that are longer than seq_len={config.seq_len}")
    examples = Examples.of(example for example, fit in zip(encoded, fits, strict=True) if fit)
    held = labelled(name, rest, tokenizer, config.eval_items, config.batch_size, config.seq_len, labels, numbers)
    known = [record for record, fit in zip(train, fits, strict=True) if fit]
    most = _mean(examples, held.examples) if numbers else majority(known, held.records, len(held))._asdict()
    return Dataset(name, examples, held, most, data_hash([*examples, *held.examples]), labels)


def _mean(train: Examples, rest: Examples) -> dict[str, Any]:
    """Always saying the training part's mean."""
    mine, theirs = (values(e.completion_ids[0] for e in part).astype(np.float64) for part in (train, rest))
    mean = float(mine.mean())
    return {"label": f"{mean:.6g}", "accuracy": None, "loss": float(np.mean((theirs - mean) ** 2))}


def labelled(
    name: str,
    records: Iterable[Record],
    tokenizer: Any,
    items: int,
    batch_size: int,
    seq_len: int,
    labels: tuple[str, ...],
    regression: bool,
) -> HeldOut:
    """The first `items` records that fit into a row, with what a head of these labels should say.

    Raises:
        LoraxError: a label that the head does not have, or none fits.
    """
    return _fitting(
        name,
        records,
        lambda record: encode_labelled(record, tokenizer, labels, regression),
        items,
        batch_size,
        seq_len,
    )


def held_out(
    tokenizer: Any,
    *,
    task: str | None,
    path: str | None,
    items: int,
    batch_size: int,
    seq_len: int,
    labels: tuple[str, ...] = (),
    regression: bool = False,
) -> HeldOut:
    """The held-out part of a demo task, or every example of a file; with labels, for a classifier.

    Raises:
        LoraxError: a malformed or empty file.
    """
    _need(tokenizer)
    name, records = (task, demo(task).heldout) if task else (str(path), list(Jsonl(str(path))))
    if labels:
        return labelled(name, records, tokenizer, items, batch_size, seq_len, labels, regression)
    return _fitting(name, records, lambda record: encode(record, tokenizer), items, batch_size, seq_len)


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise LoraxError(
            "the base has no tokenizer.json, and text cannot be read without one; put it beside the weights"
        )


def _records(config: TrainConfig, say: Say) -> tuple[str, list[Record], list[Record]]:
    if config.task:
        task = demo(config.task)
        return task.name, task.train, task.heldout
    path = str(config.data)
    records = list(Jsonl(path))
    if config.eval_data:
        return path, records, list(Jsonl(config.eval_data))
    train, rest = _hold_out(path, records, say)
    return path, train, rest


def _hold_out(path: str, records: list[Any], say: Say) -> tuple[list[Any], list[Any]]:
    """A file's training and held-out part."""
    # By content, so that the same text is on one side whatever its place or the seed.
    out = [falls_out(f"{record.prompt!r}", HELD_OUT) for record in records]
    train = [record for record, held in zip(records, out, strict=True) if not held]
    rest = [record for record, held in zip(records, out, strict=True) if held]
    if not rest or not train:
        raise LoraxError(f"{path}: {len(records)} examples are too few to hold some out; give --eval-data")
    say(f"{path}: {len(rest)} of {len(records)} examples are held out to evaluate on (--eval-data names others)")
    return train, rest


def _fitting(
    name: str,
    records: Iterable[Record],
    encoder: Callable[[Record], Example],
    items: int,
    batch_size: int,
    seq_len: int,
) -> HeldOut:
    """The first `items` records that fit into a row."""
    kept, examples = [], []
    for record in records:
        example = encoder(record)
        if len(example.ids) - 1 <= seq_len:
            kept.append(record)
            examples.append(example)
        if len(kept) == items:
            break
    if not kept:
        raise LoraxError(f"{name}: no held-out example fits into {seq_len} tokens; raise --seq-len")
    return HeldOut(name, Examples.of(examples), kept, batch_size, seq_len)
