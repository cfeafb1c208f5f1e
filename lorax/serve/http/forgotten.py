"""Names that were unloaded by a call: a restart does not find them again in the folders that it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lorax.errors import LoraxError
from lorax.io.atomic import write_json


class Forgotten:
    """A set of names, kept in a file.

    Args:
        path: the file; None keeps them for the life of this process.
    """

    def __init__(self, path: Path | None = None):
        self._path, self._names = path, set[str]()
        if path is not None and path.is_file():
            try:
                self._names = set(map(str, json.loads(path.read_text(encoding="utf-8"))["unloaded"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise LoraxError(f"{path}: cannot be read ({error}); remove it to serve every adapter") from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def add(self, name: str) -> None:
        self._change(self._names | {name})

    def discard(self, name: str) -> None:
        if name in self._names:
            self._change(self._names - {name})

    def _change(self, names: set[str]) -> None:
        if self._path is not None:
            write_json(self._path, {"unloaded": sorted(names)})
        self._names = names
