"""Examples from a JSON Lines file: one object per line, each checked, each error with its file and line."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

from lorax.data.examples import Record
from lorax.errors import LoraxError

ROLES = ("system", "user", "assistant", "tool")

_FORMAT = 'expected {"prompt": ..., "completion": ...} or {"messages": [...]}'
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Jsonl(Sequence[Record]):
    """The records of a JSONL file, read from disk when they are asked for.

    Opening notes where each line begins (eight bytes a line) and parses nothing; a line is checked when it is
    read. A line is one of

        {"prompt": "2 + 2 =", "completion": "4"}
        {"messages": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]}
        {"prompt": "2 + 2 =", "label": 4}                  (a name or a number, for a classifier or a regression)

    and other keys are ignored. Blank lines are skipped, a UTF-8 byte-order mark is accepted.

    Args:
        path: the file.

    Raises:
        LoraxError: the file cannot be read or holds no line; later, from reading a line: `file:line: what is wrong`.

    Example:
        >>> from pathlib import Path; from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.jsonl")
        ...     _ = file.write_text('{"prompt": "hello", "completion": "world"}')
        ...     Jsonl(file)[0].completion
        'world'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._offsets, self._numbers = array("Q"), array("Q")
        with self._open() as file:
            self._find_lines(file)
        if not self._offsets:
            raise LoraxError(f"{self.path}: holds no examples; {_FORMAT}, one per line")

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise LoraxError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _find_lines(self, file: BinaryIO) -> None:
        offset = 0
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(_UTF16_MARKS):
                raise LoraxError(f"{self.path}:1: the file is UTF-16; save it as UTF-8")
            if number == 1 and line.startswith(_UTF8_MARK):
                offset, line = len(_UTF8_MARK), line[len(_UTF8_MARK) :]
            if line.strip():
                self._offsets.append(offset)
                self._numbers.append(number)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self._open() as file:
            file.seek(self._offsets[index])
            return parse_line(file.readline(), f"{self.path}:{self._numbers[index]}")

    def __iter__(self) -> Iterator[Record]:
        return (parse_line(line, place) for line, place in self.lines())

    def lines(self) -> Iterator[tuple[bytes, str]]:
        """The lines as they are, each with its `file:line`."""
        with self._open() as file:
            for offset, number in zip(self._offsets, self._numbers, strict=True):
                file.seek(offset)
                yield file.readline(), f"{self.path}:{number}"


def parse_object(line: bytes, place: str, wanted: str) -> dict[str, Any]:
    """One line of a JSONL file as a JSON object. wanted: what it should look like, for errors.

    Raises:
        LoraxError: bad UTF-8, bad JSON, or another kind of value.
    """
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LoraxError(f"{place}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise LoraxError(f"{place}: not JSON at column {error.colno} ({error.msg}); {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise LoraxError(f"{place}: not JSON that can be read ({error}); {wanted}") from None
    if not isinstance(value, dict):
        raise LoraxError(f"{place}: a {_kind(value)} where an object belongs; {wanted}")
    return value


def parse_line(line: bytes, place: str) -> Record:
    """One line of a JSONL file as a record.

    Args:
        line: UTF-8 bytes.
        place: `file:line`, for errors.

    Raises:
        LoraxError: bad UTF-8, bad JSON, a missing key, a wrong type, an empty or impossible conversation.
    """
    value = parse_object(line, place, _FORMAT)
    if "messages" in value and ("prompt" in value or "completion" in value):
        raise LoraxError(f'{place}: has "messages" and "prompt"/"completion" at once; keep one of the two')
    if "messages" in value:
        return _conversation(value["messages"], place)
    return _pair(value, place)


def _pair(value: dict[str, Any], place: str) -> Record:
    if "label" in value and "completion" not in value:
        # What a classifier is to say: a name, or a number to predict.
        label = value["label"]
        number = isinstance(label, (int, float)) and not isinstance(label, bool)
        value = value | {"completion": repr(label) if number else label}
    missing = [key for key in ("prompt", "completion") if key not in value]
    if missing:
        raise LoraxError(f'{place}: has no "{missing[0]}"; {_FORMAT}')
    prompt = parse_text(value["prompt"], '"prompt"', place)
    return Record(prompt, parse_answer(value["completion"], '"completion"', place), place)


def _conversation(messages: Any, place: str) -> Record:
    if not isinstance(messages, list) or not messages:
        raise LoraxError(f'{place}: "messages" must be a list of turns with at least one in it')
    turns = tuple(parse_turn(turn, f"turn {i}", place) for i, turn in enumerate(messages, start=1))
    if turns[-1]["role"] != "assistant":
        raise LoraxError(f'{place}: the last turn is by "{turns[-1]["role"]}"; it must be by "assistant"')
    if len(turns) == 1:
        raise LoraxError(f"{place}: the assistant's turn has nothing before it to answer; add a user turn")
    for i, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant":
            parse_answer(turn["content"], f'"content" of turn {i}', place)
    return Record(turns[:-1], turns[-1]["content"], place)


def parse_turn(turn: Any, which: str, place: str) -> dict[str, str]:
    """A turn of a conversation, checked."""
    if not isinstance(turn, dict):
        raise LoraxError(f'{place}: {which} is a {_kind(turn)}; expected {{"role": ..., "content": ...}}')
    for key in ("role", "content"):
        if key not in turn:
            raise LoraxError(f'{place}: {which} has no "{key}"; expected {{"role": ..., "content": ...}}')
    role = parse_text(turn["role"], f'"role" of {which}', place)
    if role not in ROLES:
        raise LoraxError(f'{place}: "role" of {which} is "{role[:40]}"; expected one of {", ".join(ROLES)}')
    return {"role": role, "content": parse_text(turn["content"], f'"content" of {which}', place)}


def parse_text(value: Any, what: str, place: str) -> str:
    """A string, checked to be text."""
    if not isinstance(value, str):
        raise LoraxError(f"{place}: {what} is a {_kind(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise LoraxError(f"{place}: {what} has half of a surrogate pair (\\ud800-\\udfff), which is not text") from None
    return value


def parse_answer(value: Any, what: str, place: str) -> str:
    """A string with something in it."""
    text = parse_text(value, what, place)
    if not text.strip():
        raise LoraxError(f"{place}: {what} is empty: there is nothing to learn")
    return text


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
