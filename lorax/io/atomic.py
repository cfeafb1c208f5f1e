"""Files that are either the old ones or the new ones, never something in between.

What is written goes to a hidden neighbour on the same file system, is forced to the disk, and takes the name
by a rename. A full disk, an exception or a kill leaves what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lorax.errors import LoraxError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace a file's contents, creating the directories above it.

    Raises:
        LoraxError: the system refuses (disk full, no permission); a file that was there is untouched.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a" / "b.bin"
        >>> write_bytes(path, b"new")
        >>> path.read_bytes()
        b'new'
    """
    with open_new(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of a value as indented JSON. NaN and infinities, which are not JSON, raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def open_new(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write in pieces; it takes the place of `path` when the block ends without an error.

    Raises:
        LoraxError: the system refuses; a file that was there is untouched.
    """
    path = Path(path)
    aside = _neighbour(path)
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync(path.parent)
    finally:
        # Only what is left of a failure is still here; its own error is the one to hear about.
        with suppress(OSError):
            aside.unlink()


@contextmanager
def replace_dir(path: str | Path) -> Iterator[Path]:
    """A new empty directory to fill; it takes the place of `path` when the block ends without an error.

    A directory cannot be renamed over a full one, so the old one steps aside first. A kill between those two
    renames is the only moment without `path`; the next `replace_dir`, or `recover`, puts the old one back.

    Raises:
        LoraxError: the system refuses; a directory that was there is untouched.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> with replace_dir(path) as new:
        ...     _ = (new / "config.json").write_text("{}")
        >>> [p.name for p in path.iterdir()]
        ['config.json']
    """
    path = Path(path)
    aside, old = _neighbour(path), _previous(path)
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            recover(path)
            aside.mkdir()
            yield aside
            _sync_tree(aside)
            if path.exists():
                os.rename(path, old)
            try:
                os.rename(aside, path)
            except OSError:
                recover(path)
                raise
            _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def recover(path: str | Path) -> None:
    """Finish what a kill inside `replace_dir(path)` left: the old directory comes back if the new one did not
    arrive."""
    path = Path(path)
    old = _previous(path)
    if old.is_dir() and not path.exists():
        os.rename(old, path)


def _neighbour(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise LoraxError(f"{path}: cannot be written ({reason}); what was there before is unchanged") from error


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Force a file, or a directory's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories; its renames are journalled.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
