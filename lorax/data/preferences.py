"""Pairs of answers to one prompt, one of them preferred: what DPO learns from.

One JSON object per line, in one of the forms that Hugging Face's TRL reads:

    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [the same turns, another answer]}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorax.data.chat import encode, last_answer
from lorax.data.demos.split import digest
from lorax.data.demos.task import DemoTask
from lorax.data.examples import Example, Examples, Message, Record
from lorax.data.jsonl import Jsonl, parse_answer, parse_object, parse_text, parse_turn
from lorax.errors import LoraxError

_FORMAT = 'expected {"prompt": ..., "chosen": ..., "rejected": ...}'


@dataclass(frozen=True)
class Preference:
    """A prompt and two answers, the first of them preferred. prompt: as in `Record`; source: where it was read."""

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""

    def records(self) -> tuple[Record, Record]:
        """The two as examples of what might be said."""
        return Record(self.prompt, self.chosen, self.source), Record(self.prompt, self.rejected, self.source)


def preferences(path: str | os.PathLike[str]) -> list[Preference]:
    """The pairs of a JSONL file.

    Raises:
        LoraxError: the file cannot be read, or a line is none of the forms; `file:line: what is wrong`.

    Example:
        >>> from pathlib import Path; from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.jsonl")
        ...     _ = file.write_text('{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}')
        ...     preferences(file)[0].rejected
        '5'
    """
    return [_parse(line, place) for line, place in Jsonl(path).lines()]


def of_task(task: DemoTask, records: Iterable[Record]) -> list[Preference]:
    """A demo task's items with a wrong label beside the right one, chosen by a hash of the prompt.

    Raises:
        LoraxError: the task has no closed list of labels.
    """
    if task.labels is None:
        raise LoraxError(f"{task.name}: has no closed list of answers to choose a wrong one from; give --data")
    out = []
    for record in records:
        others = [label for label in task.labels if label != record.completion]
        wrong = others[digest("wrong answer", f"{record.prompt!r}") % len(others)]
        out.append(Preference(record.prompt, record.completion, wrong, record.source))
    return out


def encode_pairs(
    pairs: Iterable[Preference], tokenizer: Any, *, seq_len: int, say: Callable[[str], None] = lambda line: None
) -> tuple[Examples, list[Preference]]:
    """Pairs as tokens: examples 2 i and 2 i + 1 are the preferred answer and the other one.

    Weight is on the last answers alone: what comes before is the same in both, and prefers nothing.

    Args:
        pairs: the pairs.
        tokenizer: see `lorax.data.chat.Tokenizer`.
        seq_len: positions in a row; a pair of which one answer does not fit is dropped.
        say: is told in one line how many were dropped.

    Returns:
        The tokens, and the pairs that are in them.

    Raises:
        LoraxError: no pair is left.
    """
    kept: list[Preference] = []
    examples: list[Example] = []
    total = 0
    for pair in pairs:
        total += 1
        both = [last_answer(encode(record, tokenizer)) for record in pair.records()]
        if all(len(example.ids) - 1 <= seq_len for example in both):
            kept.append(pair)
            examples += both
    if not kept:
        raise LoraxError(f"none of {total} pairs fits into seq_len={seq_len}; raise seq_len")
    if len(kept) < total:
        say(f"dropped {total - len(kept)} of {total} pairs of which an answer is longer than seq_len={seq_len}")
    return Examples.of(examples), kept


def _parse(line: bytes, place: str) -> Preference:
    value = parse_object(line, place, _FORMAT)
    for key in ("chosen", "rejected"):
        if key not in value:
            raise LoraxError(f'{place}: has no "{key}"; {_FORMAT}')
    chosen, rejected = value["chosen"], value["rejected"]
    if isinstance(chosen, list) or isinstance(rejected, list):
        before, (yes, no) = _turns(value, place)
        prompt: Any = before
    else:
        if "prompt" not in value:
            raise LoraxError(f'{place}: has no "prompt"; {_FORMAT}')
        prompt = value["prompt"]
        turns = _conversation(prompt, '"prompt"', place) if isinstance(prompt, list) else None
        prompt = parse_text(prompt, '"prompt"', place) if turns is None else turns
        yes, no = (parse_answer(x, f'"{key}"', place) for x, key in ((chosen, "chosen"), (rejected, "rejected")))
    if yes == no:
        raise LoraxError(f"{place}: the chosen and the rejected answer are the same: there is nothing to prefer")
    return Preference(prompt, yes, no, place)


def _turns(value: dict[str, Any], place: str) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """The turns before the answers, and the answers, where those are conversations."""
    sides = [_conversation(value[key], f'"{key}"', place) for key in ("chosen", "rejected")]
    if "prompt" in value:
        prompt = value["prompt"]
        first = (
            _conversation(prompt, '"prompt"', place)
            if isinstance(prompt, list)
            else ({"role": "user", "content": parse_text(prompt, '"prompt"', place)},)
        )
        sides = [(*first, *side) for side in sides]
    if list(sides[0][:-1]) != list(sides[1][:-1]) or len(sides[0]) < 2:
        raise LoraxError(f"{place}: the two answers must follow the same turns, and at least one; {_FORMAT}")
    for side in sides:
        if side[-1]["role"] != "assistant":
            raise LoraxError(f'{place}: the last turn is by "{side[-1]["role"]}"; it must be by "assistant"')
    yes, no = (parse_answer(side[-1]["content"], "the answer", place) for side in sides)
    return tuple(sides[0][:-1]), (yes, no)


def _conversation(turns: Any, what: str, place: str) -> tuple[Message, ...]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise LoraxError(f"{place}: {what} must be a list of turns with at least one in it, as the other is")
    return tuple(parse_turn(turn, f"turn {i} of {what}", place) for i, turn in enumerate(turns, start=1))
