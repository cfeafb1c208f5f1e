"""Training many adapters together: each with its own learning rate, schedule, optimizer state, step count and loss.

What N adapters share is the base's work on one batch. What they must not share is anything that moves a weight, so the
optimizer sees the bank as rows: row p of A and of B belongs to one adapter, and the transformation runs on each row
with its owner's numbers. A row whose owner no example used does not move, and neither does its state: no decay, no
momentum, no step counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lorax.bank import Bank
from lorax.errors import LoraxError
from lorax.multi.names import banks, slot_names, slot_of
from lorax.multi.select import select
from lorax.tree import join, map_named, named_leaves, pick, split

FACTORS = ("A", "B")

# A number or a schedule (step count -> number) for all adapters, or one for each by name.
Setting = Any


class BankState(NamedTuple):
    """Optimizer state of a bank.

    count: int32 `(slots,)`, the steps that each adapter has taken.
    rows: path -> factor -> the transformation's state with a leading axis over the total rank.
    """

    count: Int[Array, "slots"]
    rows: dict[str, dict[str, Any]]


def bank_optimizer(
    make: Callable[..., optax.GradientTransformation],
    params: Any,
    learning_rate: Setting,
    clip: Setting | None = None,
    **settings: Setting,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation for a bank in which every adapter trains by itself.

    Row p of a factor takes `make(learning_rate_i, **settings_i)` with the numbers of the adapter i that owns it, so
    training N adapters together moves each as a run of its own would. State is what `make` keeps for the bank's
    parameters, and a count for each row.

    Args:
        make: `learning_rate` (a traced number) and the settings by keyword to a transformation that works element by
            element: `optax.adamw`, `optax.sgd`, `optax.lion`, or a function that chains such.
        params: the tree with the bank.
        learning_rate: a number or an Optax schedule for all, or a mapping name -> number or schedule. A schedule is
            asked with the adapter's own step count.
        clip: the largest global norm of an adapter's gradient over all its factors, likewise.
        settings: further numbers for `make`, likewise: `weight_decay=0.1`, `b1={"one": 0.9, "two": 0.8}`.

    Returns:
        A transformation whose `update(gradients, state, params, ids=ids)` needs the whole tree as `params`, and the ids
        of the batch: an adapter that is not among them is left alone, to the bit. Gradients may be those of the
        trainable half.

    Raises:
        LoraxError: something trains that is not in a bank, or a mapping that leaves out an adapter.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> base = {"w": jnp.ones((9, 7))}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=2))
        >>> params = lorax.attach(base, lorax.stack({"one": adapted, "two": adapted}))
        >>> rates = {"one": 1e-3, "two": optax.linear_schedule(1e-2, 0.0, 100)}
        >>> tx = lorax.bank_optimizer(optax.adamw, params, rates, weight_decay=0.01)
        >>> tx.init(params).count.tolist()
        [0, 0]
    """
    for path, leaf in named_leaves(params):
        if not isinstance(leaf, Bank) and jax.tree.leaves(pick(leaf, True)):
            raise LoraxError(f"bank_optimizer: {path} trains and is in no bank, so it has no adapter's learning rate")
    names, slots = _names(params, (learning_rate, clip, *settings.values()))
    every = {key: _per_slot(key, value, names) for key, value in {"learning_rate": learning_rate, **settings}.items()}
    limits = None if clip is None else _per_slot("clip", clip, names)

    def init(params: Any) -> BankState:
        found = banks(params, "bank_optimizer")
        rows = {path: {f: _fresh(make, every, _rows(leaf, f)) for f in FACTORS} for path, leaf in found.items()}
        return BankState(jnp.zeros(slots, jnp.int32), rows)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        ids = extra.get("ids")
        if params is None or ids is None:
            raise LoraxError("bank_optimizer: update(gradients, state, params, ids=ids) needs the tree and the ids")
        found, active = banks(params, "bank_optimizer"), used(ids, slots)
        owners = {path: owner(leaf) for path, leaf in found.items()}
        gradients = {path: leaf for path, leaf in named_leaves(updates) if path in found}
        # Optax mixes Python numbers and integer counts; a session with strict promotion should still run it.
        with jax.numpy_dtype_promotion("standard"):
            numbers = {key: value(state.count) for key, value in every.items()}
            shares = None if limits is None else _shares(gradients, found, owners, limits(state.count))
            moved, rows = {}, {}
            for path, leaf in found.items():
                args = (make, numbers, owners[path], active, shares)
                steps = {f: _step(*args, gradients[path], leaf, f, state.rows[path][f]) for f in FACTORS}
                moved[path] = {f: new for f, (new, _) in steps.items()}
                rows[path] = {f: kept for f, (_, kept) in steps.items()}
        out = map_named(lambda path, g: _like(g, moved.get(path), found.get(path)), updates)
        return out, BankState(state.count + active.astype(jnp.int32), rows)

    return optax.GradientTransformationExtraArgs(init, update)


def used(ids: Int[Array, "*examples"], slots: int) -> Bool[Array, "slots"]:
    """Which adapters a batch is for."""
    ids = jnp.asarray(ids).reshape(-1)
    return jnp.zeros(slots, bool).at[jnp.where(ids < 0, slots, ids)].set(True, mode="drop")


def owner(bank: Bank) -> Int[Array, "total"]:
    """The slot of each row of a bank, -1 for a free row."""
    order = jnp.argsort(jnp.where(bank.rank > 0, bank.start, bank.total))
    row = jnp.arange(bank.total, dtype=jnp.int32)
    starts = jnp.where(bank.rank > 0, bank.start, bank.total)[order]
    last = jnp.searchsorted(starts, row, side="right").astype(jnp.int32) - 1
    slot = order[jnp.maximum(last, 0)].astype(jnp.int32)
    mine = (last >= 0) & (row < bank.start[slot] + bank.rank[slot])
    return jnp.where(mine, slot, -1)


def _names(params: Any, settings: Sequence[Setting]) -> tuple[list[str | None], int]:
    """The name of each slot, and how many there are. Nobody's name is asked for where no setting is by name, so that an
    abstract tree, which has shapes alone, will do."""
    slots = next(iter(banks(params, "bank_optimizer").values())).slots
    by_name = any(isinstance(value, Mapping) for value in settings)
    return (slot_names(params, "bank_optimizer") if by_name else [None] * slots), slots


def _per_slot(key: str, value: Setting, names: Sequence[str | None]) -> Callable[[Any], Float[Array, "slots"]]:
    """A function from the step counts to the number of each slot."""
    if isinstance(value, Mapping):
        missing = [name for name in names if name is not None and name not in value]
        if missing:
            raise LoraxError(f"bank_optimizer: {key} says nothing about the adapter {missing[0]!r}; add it")
        each = [0.0 if name is None else value[name] for name in names]
    else:
        each = [value] * len(names)

    def numbers(count: Any) -> jax.Array:
        found = [v(count[i]) if callable(v) else v for i, v in enumerate(each)]
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in found])

    return numbers


def _rows(bank: Bank, factor: str) -> Any:
    """A factor (or its gradient) with the total rank in front."""
    return jnp.moveaxis(getattr(bank, factor), len(bank.axes.stack), 0)


def _fresh(make: Any, every: Mapping[str, Any], rows: Any) -> Any:
    """The transformation's first state for every row."""
    zeros = {key: jnp.float32(0) for key in every}
    with jax.numpy_dtype_promotion("standard"):
        return jax.vmap(lambda row: make(**zeros).init(row))(rows)


def _shares(gradients: Any, found: Any, owners: Any, limits: Any) -> Float[Array, "slots"]:
    """What each adapter's gradient is multiplied with, so that its norm keeps below its limit."""
    squares = jnp.zeros(limits.shape[0], jnp.float32)
    for path, slot in owners.items():
        for factor in FACTORS:
            rows = _rows(replace(found[path], **{factor: getattr(gradients[path], factor)}), factor)
            sums = jnp.sum(jnp.square(rows.astype(jnp.float32)).reshape(rows.shape[0], -1), axis=1)
            squares = squares.at[jnp.where(slot < 0, limits.shape[0], slot)].add(sums, mode="drop")
    norm = jnp.sqrt(squares)
    return jnp.where(norm < limits, 1.0, limits / jnp.where(norm > 0, norm, 1.0))


def _step(
    make: Any, numbers: Any, slot: Any, active: Any, shares: Any, gradient: Bank, bank: Bank, factor: str, state: Any
) -> tuple[Any, Any]:
    """One factor: every row moved by its owner's transformation, those of idle adapters put back."""
    rows = _rows(bank, factor)
    wanted = _rows(replace(bank, **{factor: getattr(gradient, factor)}), factor)
    safe = jnp.maximum(slot, 0)
    acts = (slot >= 0) & active[safe]
    along = lambda x: acts.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    # An idle row's gradient is zero whatever its numbers are; a free row's is not looked at.
    wanted = jnp.where(along(wanted), wanted, jnp.zeros((), wanted.dtype))
    if shares is not None:
        wanted = (wanted * shares[safe].reshape(-1, *[1] * (wanted.ndim - 1))).astype(wanted.dtype)
    each = {key: value[safe] for key, value in numbers.items()}
    one = lambda g, s, p, each: make(**each).update(g, s, p)  # noqa: E731
    moved, new = jax.vmap(one)(wanted, state, rows, each)
    moved = jnp.where(along(moved), moved, jnp.zeros((), moved.dtype)).astype(rows.dtype)
    kept = jax.tree.map(lambda n, s: jnp.where(along(n), n, s).astype(s.dtype), new, state)
    return jnp.moveaxis(moved, 0, len(bank.axes.stack)), kept


def _like(gradient: Any, moved: Any, bank: Bank | None) -> Any:
    """Updates in the gradients' structure: zeros for what does not train, None where there was None."""
    if bank is None:
        return jax.tree.map(_zero, gradient)
    still = jax.tree.map(_zero, gradient)
    return replace(still, **moved)


def _zero(x: Any) -> Any:
    return jnp.zeros(x.shape, jnp.int32 if x.dtype == jax.dtypes.float0 else x.dtype)


def reset_adapter(state: BankState, params: Any, which: str | int, tx: optax.GradientTransformation) -> BankState:
    """The state with one adapter's part as `tx.init` makes it: for a slot that a new adapter has taken.

    Args:
        state: the state of `tx` for `params`.
        params: the tree with the new adapter in its place.
        which: its name or number.
        tx: what `bank_optimizer` made.

    Raises:
        LoraxError: no such adapter.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> base = {"w": jnp.ones((9, 7))}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=2))
        >>> params = lorax.attach(base, lorax.stack({"one": adapted, "two": adapted}))
        >>> tx = lorax.bank_optimizer(optax.adam, params, 1e-3)
        >>> lorax.reset_adapter(tx.init(params), params, "two", tx).count.tolist()
        [0, 0]
    """
    slot, fresh = slot_of(params, which, "reset_adapter"), tx.init(params)
    found = banks(params, "reset_adapter")

    def one(path: str, factor: str) -> Any:
        mine = owner(found[path]) == slot
        pick_row = lambda new, old: jnp.where(mine.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(pick_row, fresh.rows[path][factor], state.rows[path][factor])  # pyright: ignore

    rows = {path: {factor: one(path, factor) for factor in FACTORS} for path in found}
    return BankState(state.count.at[slot].set(0), rows)


def bank_step(
    loss: Callable[..., Any], tx: optax.GradientTransformationExtraArgs, over: Sequence[str] | None = None
) -> Callable[..., Any]:
    """A training step for a mixed batch: one pass, one loss for each adapter.

    The loss of adapter i is the mean over its own examples, as in a run of its own; the sum over the adapters is
    differentiated, and since no term knows another adapter's factors, each gets its own gradient.

    Args:
        loss: `loss(params, *example)` for one example with one adapter's parameters, through `lift`: a number, or
            (sum, count) where examples weigh differently (tokens); the mean is then sum of sums over sum of counts.
        tx: what `bank_optimizer` makes.
        over: on a mesh, the axes that split the examples (`lorax.sharding.batch_axes`).

    Returns:
        `step(params, state, ids, *batch) -> (params, state, losses)`: ids `(examples,)`, every array of the batch with
        examples in front, losses float32 `(slots,)`, NaN for an adapter without examples. Wrap it in `jax.jit`.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> base = {"w": jnp.ones((9, 7))}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=2))
        >>> params = lorax.attach(base, lorax.stack({"one": adapted, "two": adapted}))
        >>> tx = lorax.bank_optimizer(optax.adam, params, 1e-3)
        >>> apply = lorax.lift(lambda p, x: x @ p["w"])
        >>> step = jax.jit(lorax.bank_step(lambda p, x, y: jnp.mean((apply(p, x) - y) ** 2), tx))
        >>> batch = jnp.ones((3, 4, 9)), jnp.zeros((3, 4, 7))
        >>> params, state, losses = step(params, tx.init(params), jnp.array([0, 0, -1]), *batch)
        >>> losses.tolist(), state.count.tolist()
        ([81.0, nan], [1, 0])
    """

    def step(params: Any, state: Any, ids: Any, *batch: Any) -> tuple[Any, Any, Any]:
        trained, frozen = split(params)
        slots = state.count.shape[0]

        def total(trained: Any) -> tuple[jax.Array, jax.Array]:
            whole = join(trained, frozen)
            one = lambda id, *example: loss(select(whole, id), *example)  # noqa: E731
            out = jax.vmap(one, spmd_axis_name=None if over is None else tuple(over))(ids, *batch)
            sums, counts = out if isinstance(out, tuple) else (out, jnp.ones(out.shape, out.dtype))
            means, some = per_adapter(sums, counts, ids, slots)
            return jnp.sum(means), jnp.where(some, means, jnp.nan)

        gradients, losses = jax.grad(total, has_aux=True)(trained)
        moved, state = tx.update(gradients, state, params, ids=ids)
        return join(optax.apply_updates(trained, moved), frozen), state, losses

    return step


def per_adapter(
    sums: Float[Array, "examples"], counts: Float[Array, "examples"], ids: Int[Array, "examples"], slots: int
) -> tuple[Float[Array, "slots"], Bool[Array, "slots"]]:
    """Each adapter's mean, sum of its sums over sum of its counts (0 without any), and whether it has any."""
    place = jnp.where(ids < 0, slots, ids)
    add = lambda x: jnp.zeros(slots, x.dtype).at[place].add(x, mode="drop")  # noqa: E731
    total, count = add(sums), add(counts)
    return total / jnp.where(count > 0, count, jnp.ones_like(count)).astype(total.dtype), count > 0
