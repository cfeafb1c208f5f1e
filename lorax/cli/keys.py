"""`lorax keys`: the API keys of `lorax serve`."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from lorax.cli.output import print_json, print_table
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Make, list and remove the API keys of a server. A running server sees the change within a second.

    Example: lorax keys add alice --keys keys.json --adapters legal medical
    """

    what: tyro.conf.Positional[Literal["add", "list", "remove"]]
    """What to do."""
    name: tyro.conf.Positional[str] = ""
    """Whose key: requests are counted and scheduled under this name."""
    keys: str = "keys.json"
    """The keys file. It holds digests; a key itself is shown once, when it is made."""
    adapters: tuple[str, ...] = ("*",)
    """Adapters that the key may use; * is every one. The base alone is open to every key."""
    admin: bool = False
    """The key may also load and unload adapters, and see everybody's figures."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        from lorax.serve.http import keys

        if self.what != "list" and not self.name:
            raise LoraxError(f"keys {self.what}: give the name of the key, as in lorax keys {self.what} alice")
        if self.what == "add":
            secret = keys.add(self.keys, self.name, self.adapters, self.admin)
            print_json({"name": self.name, "key": secret, "file": self.keys}) if self.json else print(secret)
        elif self.what == "remove":
            keys.remove(self.keys, self.name)
            print_json({"name": self.name, "removed": True}) if self.json else print(f"removed {self.name}")
        else:
            self._list(keys.read(self.keys))

    def _list(self, found: Sequence[Any]) -> None:
        if self.json:
            rows = [
                {"name": k.name, "adapters": list(k.adapters), "admin": k.admin, "created": k.created} for k in found
            ]
            print_json({"keys": rows})
            return
        since = [datetime.date.fromtimestamp(key.created).isoformat() for key in found]
        body = [(k.name, ", ".join(k.adapters), "yes" if k.admin else "") for k in found]
        print_table(("name", "adapters", "admin", "since"), [(*row, day) for row, day in zip(body, since, strict=True)])
