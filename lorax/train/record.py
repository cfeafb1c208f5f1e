"""What a run leaves behind to be read: its record, its metrics, its report."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError

PACKAGES = (
    "lorax-flax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "tokenizers",
)


def environment() -> dict[str, Any]:
    """Versions, device and git state: what else decides the numbers of a run."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "machine": {"system": platform.system(), "arch": platform.machine(), "cpus": os.cpu_count()},
        "git": git_state(Path.cwd()),
        "argv": sys.argv[1:],
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files were changed, of the repository around `folder`; None outside one."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that an earlier run wrote.

    Raises:
        LoraxError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise LoraxError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise LoraxError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise LoraxError(f"{path}: holds {type(value).__name__}, not an object")
    return value


class MetricsLog:
    """`metrics.jsonl`: one row per step, each step once, whatever the run lived through.

    Rows are on the disk before the checkpoint of their step is published (`sync`), so a resumed run has every
    row up to its checkpoint; rows after it belong to steps that will be taken again and are cut off.

    Args:
        path: the file.
        upto: keep the rows of steps 1..upto and drop the rest.
    """

    def __init__(self, path: Path, upto: int = 0):
        self.rows = [row for row in _rows(path) if row["step"] <= upto]
        aside = path.with_name(path.name + ".writing")
        try:
            with aside.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            # Unbuffered: a row that the disk refused is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise LoraxError(f"{path}: cannot be written ({error.strerror})") from error
        self.path = path

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it must have `step`.

        Raises:
            LoraxError: the disk is full.
        """
        self.rows.append(row)
        line = (json.dumps(row) + "\n").encode()
        with self._explained():
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Force all rows to the disk."""
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LoraxError(
                f"{self.path}: cannot be written ({error.strerror}); the last checkpoint is intact; "
                "free some space and run again with --resume"
            ) from error


class NoLog:
    """The log of a process that another one writes for."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Keep nothing."""

    def sync(self) -> None:
        """Nothing to force."""

    def close(self) -> None:
        """Nothing to close."""


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a line cut short by a kill ends the reading."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows
