"""The registered set on the disk, so that an engine that was killed comes back with the adapters that it had."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax.errors import LoraxError
from lorax.io.atomic import write_json
from lorax.serve.errors import AdapterError

FILE = "adapters.json"


class Entry(NamedTuple):
    """A registered adapter. ranks, counts: of each site, its rank and the pages that it takes."""

    name: str
    path: str
    digest: str
    ranks: tuple[int, ...]
    counts: tuple[int, ...]
    parameters: int
    loaded_at: float


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """The whole set, or what was there before.

    Raises:
        AdapterError: the disk refuses.
    """
    try:
        write_json(folder / FILE, {"adapters": [entry._asdict() for entry in entries]})
    except LoraxError as error:
        raise AdapterError(str(error), "io") from None


def read(folder: Path | None) -> list[Entry]:
    """The set; empty where there is none.

    Raises:
        LoraxError: the file is damaged.
    """
    if folder is None or not (folder / FILE).is_file():
        return []
    try:
        rows = json.loads((folder / FILE).read_text(encoding="utf-8"))["adapters"]
        return [_entry(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoraxError(f"{folder / FILE}: is damaged ({error}); delete it, and load the adapters again") from None


def _entry(row: dict[str, Any]) -> Entry:
    entry = Entry(**row)
    numbers = [*entry.ranks, *entry.counts, entry.parameters, entry.loaded_at]
    if not all(isinstance(x, (int, float)) for x in numbers) or not entry.ranks:
        raise TypeError("a number is none")
    if not all(isinstance(x, str) for x in entry[:3]):
        raise TypeError("a text is none")
    return entry._replace(ranks=tuple(entry.ranks), counts=tuple(entry.counts))
