"""What a run reads: a training stream, a held-out set, and what the majority class would score on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorax.data import (
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

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches in a fixed order, each example once."""
        return eval_batches(self.examples, self.batch_size, self.seq_len)

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
        majority: accuracy, loss and label of the most frequent completion.
        sha256: of both parts; a resumed run must find the same.
    """

    name: str
    train: Examples
    held_out: HeldOut
    majority: dict[str, Any]
    sha256: str

    def stream(self, config: TrainConfig) -> TrainStream:
        """Micro-batches without end, from the beginning."""
        return TrainStream(self.train, config.batch_size, config.seq_len, seed=config.seed, pack=config.pack)


def prepare(config: TrainConfig, tokenizer: Any, say: Say) -> Dataset:
    """Read, split and tokenize what `config` names.

    Args:
        config: `task`, `data`, `eval_data`, `eval_items`, `seq_len` and `batch_size` are read.
        tokenizer: the base model's.
        say: told of what the user should know: dropped examples, a part held out.

    Raises:
        LoraxError: a malformed line (file and line), an empty set, or too few examples to hold some out.
    """
    _need(tokenizer)
    name, train, rest = _records(config, say)
    examples = encode_all(train, tokenizer, seq_len=config.seq_len, say=say)
    held_out = _fitting(name, rest, tokenizer, config.eval_items, config.batch_size, config.seq_len)
    most = majority(train, held_out.records, held_out.completion_tokens)
    digest = data_hash([*examples, *held_out.examples])
    return Dataset(name, examples, held_out, most._asdict(), digest)


def held_out(
    tokenizer: Any, *, task: str | None, path: str | None, items: int, batch_size: int, seq_len: int
) -> HeldOut:
    """The held-out part of a demo task, or every example of a file.

    Raises:
        LoraxError: a malformed or empty file.
    """
    _need(tokenizer)
    name, records = (task, demo(task).heldout) if task else (str(path), list(Jsonl(str(path))))
    return _fitting(name, records, tokenizer, items, batch_size, seq_len)


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
    # By content, so that the same text is on one side whatever its place or the seed.
    out = [falls_out(f"{record.prompt!r}", HELD_OUT) for record in records]
    train = [record for record, held in zip(records, out, strict=True) if not held]
    rest = [record for record, held in zip(records, out, strict=True) if held]
    if not rest or not train:
        raise LoraxError(f"{path}: {len(records)} examples are too few to hold some out; give --eval-data")
    say(f"{path}: {len(rest)} of {len(records)} examples are held out to evaluate on (--eval-data names others)")
    return path, train, rest


def _fitting(name: str, records: list[Record], tokenizer: Any, items: int, batch_size: int, seq_len: int) -> HeldOut:
    """The first `items` records that fit into a row."""
    kept, examples = [], []
    for record in records:
        example = encode(record, tokenizer)
        if len(example.ids) - 1 <= seq_len:
            kept.append(record)
            examples.append(example)
        if len(kept) == items:
            break
    if not kept:
        raise LoraxError(f"{name}: no held-out example fits into {seq_len} tokens; raise --seq-len")
    return HeldOut(name, Examples.of(examples), kept, batch_size, seq_len)
