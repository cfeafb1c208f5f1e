"""API keys: who may ask, and which adapters each may use.

A key is 256 random bits, shown once. The file holds its SHA-256 alone: a key of that size cannot be guessed, so a slow
hash, which is for passwords, would only slow every request. A key is looked for by comparing its digest with every
entry's in constant time, the whole list each time, so that how long it took tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError
from lorax.io.atomic import write_json

PREFIX = "lorax-"
EVERY = "*"


@dataclass(frozen=True)
class Key:
    """An entry of a keys file.

    name: of the key; requests are counted and scheduled under it.
    digest: SHA-256 of the key, hexadecimal.
    adapters: names that it may use, or `*` for every one. The base alone is open to every key.
    admin: whether it may load and unload adapters, and see everybody's figures.
    created: seconds since 1970.
    """

    name: str
    digest: str
    adapters: tuple[str, ...] = (EVERY,)
    admin: bool = False
    created: int = 0

    def may_use(self, adapter: str) -> bool:
        """Whether requests for this adapter are served to this key."""
        return EVERY in self.adapters or adapter in self.adapters


# Without a keys file everybody on this machine may ask; administration still needs a key.
ANYONE = Key("anyone", "")


def digest(key: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: str | Path) -> list[Key]:
    """The entries of a keys file.

    Raises:
        LoraxError: no such file, not JSON, or an entry that lacks something.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["keys"]
        keys = [
            Key(str(r["name"]), str(r["sha256"]), tuple(map(str, r["adapters"])), r["admin"] is True, int(r["created"]))
            for r in rows
        ]
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror or error}); make it with lorax keys add") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LoraxError(
            f"{path}: is no keys file ({type(error).__name__}: {error}); lorax keys add makes one"
        ) from None
    if len({key.name for key in keys}) != len(keys):
        raise LoraxError(f"{path}: two keys have the same name; remove one with lorax keys remove")
    return keys


def write(path: str | Path, keys: Sequence[Key]) -> None:
    """Replace a keys file, readable by its owner alone."""
    path = Path(path)
    rows = [
        {"name": k.name, "sha256": k.digest, "adapters": list(k.adapters), "admin": k.admin, "created": k.created}
        for k in keys
    ]
    # The new file is created under this mask: it is at no moment open to others.
    mask = os.umask(0o077)
    try:
        write_json(path, {"keys": rows})
    finally:
        os.umask(mask)


def add(path: str | Path, name: str, adapters: Sequence[str] = (EVERY,), admin: bool = False) -> str:
    """Put a new key into a file, made if there is none, and return the key: nothing can show it again.

    Raises:
        LoraxError: a name that is taken or empty, or a file that cannot be read or written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "keys.json"
        >>> key = add(file, "alice", ["legal"])
        >>> Keys(file).find(key).name, key in file.read_text()
        ('alice', False)
    """
    path = Path(path)
    keys = read(path) if path.exists() else []
    if not name.strip() or any(key.name == name for key in keys):
        raise LoraxError(f"{path}: there is a key named {name!r} already; remove it first, or take another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    write(path, [*keys, Key(name, digest(secret), tuple(adapters), admin, int(time.time()))])
    return secret


def remove(path: str | Path, name: str) -> None:
    """Take a key out of a file; a running server forgets it within a second.

    Raises:
        LoraxError: there is none of that name.
    """
    keys = read(path)
    if all(key.name != name for key in keys):
        raise LoraxError(f"{path}: no key named {name!r}; there are {', '.join(k.name for k in keys) or 'none'}")
    write(path, [key for key in keys if key.name != name])


class Keys:
    """The keys that a server knows: a file, read again when it changes, and one admin key from the environment.

    Args:
        path: the keys file; None lets everybody ask.
        admin: a key that may administrate, beside those of the file.

    Raises:
        LoraxError: the file is not a keys file.
    """

    def __init__(self, path: str | Path | None = None, admin: str | None = None):
        self._path = None if path is None else Path(path)
        self._extra = [] if not admin else [Key("admin", digest(admin), (EVERY,), True)]
        self._lock, self._looked = threading.Lock(), 0.0
        self._stamp: Any = None
        self._keys: list[Key] = []
        if self._path is not None:
            self._stamp, self._keys = _stamp(self._path), read(self._path)

    @property
    def required(self) -> bool:
        """Whether requests without a key are refused."""
        return self._path is not None

    @property
    def admins(self) -> bool:
        """Whether there is any key that may administrate."""
        return any(key.admin for key in self._current())

    def find(self, key: str) -> Key | None:
        """The entry of a key, by comparing with every entry in constant time."""
        given = digest(key)
        found = None
        for entry in self._current():
            if hmac.compare_digest(given, entry.digest):
                found = entry
        return found

    def _current(self) -> list[Key]:
        """The file's keys, looked at again at most once a second. A file that is damaged leaves the last good ones."""
        if self._path is not None:
            with self._lock:
                if time.monotonic() - self._looked > 1.0:
                    self._looked = time.monotonic()
                    stamp = _stamp(self._path)
                    if stamp is not None and stamp != self._stamp:
                        self._stamp, self._keys = stamp, self._read_again()
        return [*self._keys, *self._extra]

    def _read_again(self) -> list[Key]:
        assert self._path is not None
        try:
            return read(self._path)
        except LoraxError:
            return self._keys


def _stamp(path: Path) -> Any:
    """What changes when the file is replaced; None while it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
