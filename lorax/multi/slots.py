"""Adapters into and out of a bank of fixed capacity: where there is room is found on the host, what moves is data.

Nothing changes shape, so a compiled step takes the new bank as it took the old one; and each weight's update is one
program whatever the rank, because new factors are padded to `max_rank` on their way in and the padding is dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.bank import Bank
from lorax.errors import LoraxError
from lorax.multi.names import banks, encode, slot_names, slot_of
from lorax.multi.stack import low_rank_leaves
from lorax.tree import map_named
from lorax.weights import LowRank


def first_fit(taken: Sequence[tuple[int, int]], total: int, size: int, align: int = 1) -> int | None:
    """The first multiple of `align` from which `size` rows are free, or None.

    taken: (start, rank) of every adapter; they do not overlap.

    Example:
        >>> first_fit([(0, 2), (4, 2)], total=8, size=2), first_fit([(0, 2), (4, 2)], total=8, size=3)
        (2, None)
    """
    at = 0
    for start, rank in sorted((s, r) for s, r in taken if r):
        if start - at >= size:
            return at
        at = max(at, -(-(start + rank) // align) * align)
    return at if total - at >= size else None


def adapter_names(params: Any) -> list[str | None]:
    """The name of each slot of a bank, None where it is free.

    Raises:
        LoraxError: no bank in the tree, or inside a trace.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=2))
        >>> lorax.adapter_names(lorax.stack({"one": adapted}, capacity=2))
        ['one', None]
    """
    return slot_names(params, "adapter_names")


def add_adapter(params: Any, name: str, adapter: Any, align: int = 1) -> Any:
    """The tree with one more adapter in its banks, in the first free slot. Nothing that takes the tree recompiles.

    Args:
        params: a bank, alone or over its base; it is not modified.
        name: a name that is not taken.
        adapter: an adapted tree, or an adapter off its base.
        align: as in `stack`.

    Raises:
        LoraxError: the name is taken, no slot or no rank is free, a rank above `max_rank`, or a weight that the banks
            do not have; says which, and what to do.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((9, 7))}
        >>> adapt = lambda r: lorax.adapt(jax.random.key(r), base, lorax.LoraSpec(targets="w", rank=r))
        >>> bank = lorax.stack({"one": adapt(2)}, capacity=2, total_rank=5)
        >>> lorax.adapter_names(lorax.add_adapter(bank, "two", adapt(1)))
        ['one', 'two']
    """
    names = slot_names(params, "add_adapter")
    if name in names:
        raise LoraxError(f"add_adapter: {name!r} is in the bank already; replace_adapter puts another in its place")
    if None not in names:
        raise LoraxError(f"add_adapter: all {len(names)} slots are taken; remove_adapter, or stack with more capacity")
    return _put(params, names.index(None), name, low_rank_leaves(name, adapter), align)


def replace_adapter(params: Any, name: str, adapter: Any, align: int = 1) -> Any:
    """The tree with another adapter under a name that is taken; its id stays. Its rank and targets may differ.

    Raises:
        LoraxError: as `add_adapter`, or no adapter of this name.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((9, 7))}, lorax.LoraSpec(targets="w", rank=2))
        >>> bank = lorax.stack({"one": adapted, "two": adapted})
        >>> small = lorax.adapt(jax.random.key(1), {"w": jnp.ones((9, 7))}, lorax.LoraSpec(targets="w", rank=1))
        >>> lorax.replace_adapter(bank, "one", small)["w"].rank.tolist()
        [1, 2]
    """
    slot = slot_of(params, name, "replace_adapter")
    return _put(params, slot, name, low_rank_leaves(name, adapter), align)


def remove_adapter(params: Any, name: str) -> Any:
    """The tree without an adapter: its rows become zeros, its slot and its rank are free, other ids stay.

    Raises:
        LoraxError: no adapter of this name.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((9, 7))}, lorax.LoraSpec(targets="w", rank=2))
        >>> bank = lorax.stack({"one": adapted, "two": adapted})
        >>> lorax.adapter_names(lorax.remove_adapter(bank, "one"))
        [None, 'two']
    """
    slot = slot_of(params, name, "remove_adapter")
    return _put(params, slot, None, {}, 1)


def _put(params: Any, slot: int, name: str | None, leaves: dict[str, LowRank], align: int) -> Any:
    """A slot's adapter replaced in every bank of the tree; all is checked before anything is computed."""
    found = banks(params, "add_adapter")
    for path, leaf in leaves.items():
        _check(path, name, leaf, found)
    starts = {path: _room(path, bank, slot, leaves.get(path), align) for path, bank in found.items()}
    row = np.zeros(next(iter(found.values())).names.shape[1], np.uint8) if name is None else encode(name)

    def one(path: str, bank: Any) -> Any:
        if path not in found:
            return bank
        return _written(bank, slot, row, starts[path], leaves.get(path))

    return map_named(one, params)


def _check(path: str, name: str | None, leaf: LowRank, found: dict[str, Bank]) -> None:
    bank = found.get(path)
    if bank is None:
        raise LoraxError(
            f"{path}: adapter {name!r} changes this weight and the bank has none there; stack it together with an "
            "adapter that does"
        )
    if leaf.axes != bank.axes or leaf.shape != bank.shape:
        raise LoraxError(f"{path}: adapter {name!r} is for shape {leaf.shape} and the bank for {bank.shape}")
    if leaf.rank > bank.max_rank:
        raise LoraxError(
            f"{path}: rank {leaf.rank} of adapter {name!r} is above the bank's max_rank={bank.max_rank}; stack with a "
            "larger one"
        )


def _room(path: str, bank: Bank, slot: int, leaf: LowRank | None, align: int) -> int:
    """Where an adapter's rows go once the slot's old ones are free."""
    if leaf is None:
        return 0
    start, rank = np.asarray(bank.start), np.asarray(bank.rank)
    taken = [(int(start[i]), int(rank[i])) for i in range(bank.slots) if i != slot]
    if leaf.rank <= int(rank[slot]):
        # In place, so that what is trained beside it (optimizer state) stays where it is.
        return int(start[slot])
    at = first_fit(taken, bank.total, leaf.rank, align)
    if at is None:
        free = bank.total - sum(r for _, r in taken)
        way = "compact_bank brings the free rows together" if free >= leaf.rank else "stack with a larger total_rank"
        raise LoraxError(f"{path}: rank {leaf.rank} finds no room, {free} of {bank.total} rows are free; {way}")
    return at


def _written(bank: Bank, slot: int, name: np.ndarray, start: int, leaf: LowRank | None) -> Bank:
    s = len(bank.axes.stack)
    rank = 0 if leaf is None else leaf.rank
    layers = bank.A.shape[:s]
    new = [np.zeros((*layers, bank.max_rank, *x.shape[s + 1 :]), x.dtype) for x in (bank.A, bank.B)]
    scale = np.zeros(layers, np.float32)
    if leaf is not None:
        front = (slice(None),) * s
        new[0][(*front, slice(0, rank))] = np.moveaxis(np.asarray(leaf.A), -1, s)
        new[1][(*front, slice(0, rank))] = np.asarray(leaf.B)
        scale = np.broadcast_to(np.asarray(leaf.scale, np.float32), layers)
    fields = (bank.A, bank.B, bank.scale, bank.start, bank.rank, bank.names)
    numbers = np.asarray([slot, start, rank], np.int32)
    a, b, scales, starts, ranks, names = _write(s, *fields, numbers, *new, scale, name)
    return replace(bank, A=a, B=b, scale=scales, start=starts, rank=ranks, names=names)


@functools.partial(jax.jit, static_argnums=0)
def _write(
    s: int,
    a: Any,
    b: Any,
    scale: Any,
    start: Any,
    rank: Any,
    names: Any,
    numbers: Any,
    new_a: Any,
    new_b: Any,
    new_scale: Any,
    name: Any,
) -> tuple[Any, ...]:
    """One program for every change of a bank of this shape: old rows to zero, new rows in, tables up to date."""
    slot, new_start, new_rank = numbers
    total, size = a.shape[s], new_a.shape[s]
    position = jnp.arange(size, dtype=jnp.int32)
    front = (slice(None),) * s
    # Positions beyond a rank point outside, where they are dropped.
    old = jnp.where(position < rank[slot], start[slot] + position, total)
    new = jnp.where(position < new_rank, new_start + position, total)
    factors = (
        x.at[(*front, old)].set(0, mode="drop").at[(*front, new)].set(n, mode="drop")
        for x, n in ((a, new_a), (b, new_b))
    )
    return (
        *factors,
        scale.at[..., slot].set(new_scale),
        start.at[slot].set(new_start),
        rank.at[slot].set(new_rank),
        names.at[slot].set(name),
    )
