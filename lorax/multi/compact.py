"""`compact_bank`: the free rows of a bank in one piece, and what an optimizer keeps for the rows moved with them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from lorax.bank import Bank
from lorax.multi.names import banks, slot_names
from lorax.multi.train import BankState
from lorax.tree import map_named


@overload
def compact_bank(params: Any, state: None = None) -> Any: ...


@overload
def compact_bank(params: Any, state: BankState) -> tuple[Any, BankState]: ...


def compact_bank(params: Any, state: BankState | None = None) -> Any:
    """The tree with every bank's adapters moved together, in order, so that the free rows are one piece at the end.

    Args:
        params: a tree with banks; it is not modified.
        state: what `bank_optimizer` keeps for it, if they train: its rows move as the bank's do.

    Returns:
        The tree; with a state, both.

    Raises:
        LoraxError: no bank in the tree, or inside a trace.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((9, 7))}, lorax.LoraSpec(targets="w", rank=2))
        >>> bank = lorax.stack({"one": adapted, "two": adapted})
        >>> state = lorax.bank_optimizer(optax.adam, bank, 1e-3).init(bank)
        >>> bank, state = lorax.compact_bank(lorax.remove_adapter(bank, "one"), state)
        >>> bank["w"].start.tolist()
        [0, 0]
    """
    found = banks(params, "compact_bank")
    slot_names(params, "compact_bank")
    moves = {path: _moves(bank) for path, bank in found.items()}
    tree = map_named(lambda path, leaf: _compacted(leaf, *moves[path]) if path in found else leaf, params)
    if state is None:
        return tree
    rows = {path: jax.tree.map(_taker(moves[path][0], 0), each) for path, each in state.rows.items()}
    return tree, state._replace(rows=rows)


def _moves(bank: Bank) -> tuple[np.ndarray, np.ndarray]:
    """Which old row each new row is (the total where it is free), and each adapter's new start."""
    start, rank = np.asarray(bank.start), np.asarray(bank.rank)
    order, new, at = np.full(bank.total, bank.total), start.copy(), 0
    for i in np.lexsort((start, rank == 0)).tolist():
        size, first = int(rank[i]), int(start[i])
        if size:
            order[at : at + size] = np.arange(first, first + size)
            new[i], at = at, at + size
    return order, new


def _taker(order: np.ndarray, axis: int) -> Any:
    return functools.partial(jnp.take, indices=jnp.asarray(order), axis=axis, mode="fill", fill_value=0)


def _compacted(bank: Bank, order: np.ndarray, start: np.ndarray) -> Bank:
    take = _taker(order, len(bank.axes.stack))
    return replace(bank, A=take(bank.A), B=take(bank.B), start=jnp.asarray(start, jnp.int32))
