"""`stack` and `unstack`: adapters of any ranks into one bank, and one out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.bank import NAME_BYTES, Bank
from lorax.errors import LoraxError
from lorax.multi.names import banks, encode, slot_of
from lorax.tree import map_named, named_leaves, pick
from lorax.weights import Change, Concat, Full, LowRank, is_structured, wider


def stack(
    adapters: Mapping[str, Any] | Sequence[Any],
    capacity: int | None = None,
    total_rank: int | None = None,
    max_rank: int | None = None,
    align: int = 1,
) -> Any:
    """A bank: adapters of different ranks, scales and targets in one tree.

    The factors lie one after the other along one axis, so that a weight's bank takes sum(rank_i) (in + out) numbers.
    Put it over a base with `attach(base, bank)`; `select` says which adapter acts. An adapter's dropout stays behind.
    LoRA-FA and VeRA adapters go in as the low-rank change that they equal, all of which trains from then on.

    Args:
        adapters: adapted trees or adapters (`extract`, `load_adapter`) by name; a sequence has the names "0", "1", ...
            Each may change other weights than its neighbours.
        capacity: adapters that there is room for; as many as are given by default.
        total_rank: rank that each weight's bank has room for; by default what the adapters need there.
        max_rank: a bound on the rank of every adapter ever put in; by default the largest given.
        align: starts are multiples of it: 8 lets a TPU kernel read whole tiles, at up to 7 unused rows an adapter.

    Returns:
        An adapter tree with a `Bank` wherever an adapter changes a weight.

    Raises:
        LoraxError: nothing to stack, an adapter with a change that equals no low-rank one (DoRA, whole weights),
            adapters for different bases, or no room; names the weight.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> base = {"w": jnp.ones((3, 5))}
        >>> adapt = lambda r: lorax.adapt(jax.random.key(r), base, lorax.LoraSpec(targets="w", rank=r))
        >>> lorax.attach(base, lorax.stack({"small": adapt(1), "large": adapt(3)}))["w"]
        Bank(shape=(3, 5), slots=2, total_rank=4, base=float32)
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else {str(i): a for i, a in enumerate(adapters)}
    if not named:
        raise LoraxError("stack: no adapters; give at least one, whose weights the bank then has")
    slots = len(named) if capacity is None else capacity
    if slots < len(named):
        raise LoraxError(f"stack: capacity={capacity} is below the {len(named)} adapters given")
    changes = {name: low_rank_leaves(name, adapter) for name, adapter in named.items()}
    ranks = [leaf.rank for leaves in changes.values() for leaf in leaves.values()]
    bound = max(ranks) if max_rank is None else max_rank
    if bound < max(ranks):
        raise LoraxError(f"stack: max_rank={max_rank} is below the rank {max(ranks)} of an adapter")
    rows = np.zeros((slots, NAME_BYTES), np.uint8)
    for i, name in enumerate(named):
        rows[i] = encode(name)
    paths = list(dict.fromkeys(path for leaves in changes.values() for path in leaves))
    leaves = {path: _bank(path, changes, slots, total_rank, bound, align, rows) for path in paths}
    return _tree(next(iter(named.values())), leaves)


def low_rank_leaves(name: str, adapter: Any) -> dict[str, LowRank]:
    """An adapter's changes by path, all of them as low-rank changes: those of LoRA-FA and VeRA as what they equal.

    Raises:
        LoraxError: a change that equals no low-rank one, or none at all.
    """
    changes = {path: leaf for path, leaf in named_leaves(adapter) if is_structured(leaf)}
    plain = {path: leaf.low_rank() if isinstance(leaf, Change) else None for path, leaf in changes.items()}
    found = {path: leaf for path, leaf in plain.items() if leaf is not None}
    for path, leaf in changes.items():
        if path not in found and _trains(leaf):
            raise LoraxError(f"adapter {name!r}: {path} {_why_not(leaf)}; merge this adapter, or train it without that")
    if not found:
        raise LoraxError(f"adapter {name!r}: changes no weight; pass an adapted tree, or what lorax.extract gives")
    return found


def _why_not(leaf: Any) -> str:
    """Why a leaf cannot go into a bank."""
    kind = leaf.KIND if isinstance(leaf, Change) else ""
    if kind == "dora":
        return (
            "is a DoRA change, which scales the base's own columns as well, and a bank adds low-rank changes to a base"
        )
    if isinstance(leaf, (Full, Concat)):
        return "was trained as a whole (train_also, or full fine-tuning), and a bank adds low-rank changes to a base"
    return f"is a {kind or type(leaf).__name__}, and a bank holds low-rank changes only"


def _trains(leaf: Any) -> bool:
    return bool(jax.tree.leaves(pick(leaf, True)))


def _bank(
    path: str, changes: dict[str, dict[str, LowRank]], slots: int, total: int | None, bound: int, align: int, names: Any
) -> Bank:
    mine = [leaves.get(path) for leaves in changes.values()]
    first = next(leaf for leaf in mine if leaf is not None)
    for name, leaf in zip(changes, mine, strict=True):
        if leaf is not None and (leaf.axes != first.axes or leaf.shape != first.shape):
            raise LoraxError(
                f"{path}: adapter {name!r} is for shape {leaf.shape} with {leaf.axes}, another for {first.shape} with "
                f"{first.axes}: they are for different bases"
            )
    start, rank, end = np.zeros(slots, np.int32), np.zeros(slots, np.int32), 0
    for i, leaf in enumerate(mine):
        if leaf is not None:
            start[i], rank[i] = -(-end // align) * align, leaf.rank
            end = int(start[i]) + leaf.rank
    room = end if total is None else total
    if room < end:
        raise LoraxError(f"{path}: total_rank={total} is below the {end} that the adapters need here")
    present = [(i, leaf) for i, leaf in enumerate(mine) if leaf is not None]
    s = len(first.axes.stack)
    return Bank(
        base=None,
        A=_laid_out([(int(start[i]), jnp.moveaxis(leaf.A, -1, s)) for i, leaf in present], room, s),
        B=_laid_out([(int(start[i]), leaf.B) for i, leaf in present], room, s),
        scale=_scales(mine, first.A.shape[:s], slots),
        start=jnp.asarray(start),
        rank=jnp.asarray(rank),
        names=jnp.asarray(names),
        axes=first.axes,
        max_rank=bound,
    )


def _laid_out(parts: list[tuple[int, jax.Array]], room: int, axis: int) -> jax.Array:
    """Factors one after the other along `axis`, zeros where there is none."""
    dtype: Any = parts[0][1].dtype
    for _, x in parts[1:]:
        dtype = wider(dtype, x.dtype)
    pieces, at = [], 0
    for start, x in parts:
        pieces += [_zeros(x, start - at, axis, dtype), x.astype(dtype)]
        at = start + x.shape[axis]
    pieces.append(_zeros(parts[0][1], room - at, axis, dtype))
    return jnp.concatenate([x for x in pieces if x.shape[axis]], axis=axis)


def _zeros(like: jax.Array, size: int, axis: int, dtype: Any) -> jax.Array:
    return jnp.zeros((*like.shape[:axis], size, *like.shape[axis + 1 :]), dtype)


def _scales(leaves: Sequence[LowRank | None], layers: tuple[int, ...], slots: int) -> jax.Array:
    columns = [jnp.zeros(layers) if leaf is None else jnp.broadcast_to(leaf.scale, layers) for leaf in leaves]
    columns += [jnp.zeros(layers)] * (slots - len(leaves))
    return jnp.stack([c.astype(jnp.float32) for c in columns], axis=-1)


def _tree(like: Any, leaves: dict[str, Bank]) -> Any:
    """The banks at their paths: in the adapter's own tree where it has them all, else in nested dicts."""
    paths = {path for path, _ in named_leaves(jax.tree.map(lambda _: 0, like, is_leaf=is_structured))}
    if set(leaves) <= paths:
        return map_named(lambda path, _: leaves.get(path), like)
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for word in above:
            node = node.setdefault(word, {})
        node[last] = leaf
    return tree


def unstack(params: Any, which: str | int) -> Any:
    """One adapter out of a bank, by name or number: the inverse of `stack` for it.

    Args:
        params: a bank, alone or over its base.
        which: the adapter.

    Returns:
        The tree with `LowRank` leaves where this adapter changes a weight, over the base where the bank was. Other
        banks leave their base; without one, None.

    Raises:
        LoraxError: no such adapter.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> adapted = lorax.adapt(jax.random.key(0), {"w": jnp.ones((3, 5))}, lorax.LoraSpec(targets="w", rank=2))
        >>> lorax.unstack(lorax.stack({"one": adapted, "two": adapted}), "two")["w"]
        LowRank(shape=(3, 5), rank=2, base=no base)
    """
    slot = slot_of(params, which, "unstack")
    banks(params, "unstack")

    def one(leaf: Any) -> Any:
        return low_rank_of(leaf, slot) if isinstance(leaf, Bank) else leaf

    return jax.tree.map(one, params, is_leaf=is_structured)


def low_rank_of(bank: Bank, slot: int) -> Any:
    """The adapter in a slot as a low-rank weight; the base (or None) where it does not change this one."""
    start, rank = int(bank.start[slot]), int(bank.rank[slot])
    if rank == 0:
        return bank.base
    s = len(bank.axes.stack)
    a, b = (jax.lax.slice_in_dim(x, start, start + rank, axis=s) for x in (bank.A, bank.B))
    scale = bank.scale[..., slot]
    return LowRank(bank.base, jnp.moveaxis(a, s, -1), b, scale, bank.axes)
