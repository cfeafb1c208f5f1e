"""Names of adapters as rows of bytes, so that a name is data like the factors."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer

from lorax.bank import NAME_BYTES, Bank
from lorax.errors import LoraxError
from lorax.tree import named_leaves


def encode(name: str) -> np.ndarray:
    """A name as a row of bytes.

    Raises:
        LoraxError: no text, empty, longer than a row, or with a zero byte.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise LoraxError(f"{name!r} is no adapter's name; use a text of 1 to {NAME_BYTES} bytes")
    data = name.encode()
    if len(data) > NAME_BYTES:
        raise LoraxError(f"the name {name!r} takes {len(data)} bytes; use at most {NAME_BYTES}")
    return np.frombuffer(data.ljust(NAME_BYTES, b"\0"), np.uint8).copy()


def decode(names: np.ndarray) -> list[str | None]:
    """The name of each slot, None where it is free."""
    return [bytes(row).rstrip(b"\0").decode() or None for row in names]


def banks(params: Any, what: str) -> dict[str, Bank]:
    """The banks of a tree by path.

    Raises:
        LoraxError: there are none.
    """
    found = {path: leaf for path, leaf in named_leaves(params) if isinstance(leaf, Bank)}
    if not found:
        raise LoraxError(f"{what}: this tree holds no bank of adapters; make one with lorax.stack and attach it")
    return found


def slot_names(params: Any, what: str) -> list[str | None]:
    """The name of each slot of a tree's banks, None where it is free.

    Raises:
        LoraxError: inside a trace, where the names are not known.
    """
    names = next(iter(banks(params, what).values())).names
    if isinstance(names, Tracer):
        raise LoraxError(f"{what}: names are not known inside a traced function; use lorax.adapter_ids outside of it")
    return decode(np.asarray(names))


def slot_of(params: Any, which: Any, what: str) -> int:
    """The slot of an adapter by name or number.

    Raises:
        LoraxError: there is no such adapter; names those that are there.
    """
    names = slot_names(params, what)
    if isinstance(which, str):
        if which in names:
            return names.index(which)
    elif 0 <= int(which) < len(names) and names[int(which)] is not None:
        return int(which)
    known = ", ".join(name for name in names if name is not None) or "none"
    raise LoraxError(f"{what}: the bank has no adapter {which!r}; it has {known[:200]}")
