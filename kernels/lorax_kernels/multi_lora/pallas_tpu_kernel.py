"""The grouped product's body on a TPU: one tile of rows after the other, each with the windows of ranks that it needs.

    h = x aw^T     columns of other rows' adapters zero, times the weight     y = added + h bw

Factors stay in HBM as they are stored, (total, K) and (total, N). What a window needs is copied stripe by stripe, whole
tiles of memory, while the window before is multiplied; then it is moved to the top of its unit (an adapter may begin
anywhere), rounded to x's dtype and kept as `aw` and `bw` until a window differs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.multi_lora.pallas_tpu_plan import Plan, stripe
from lorax_kernels.multi_lora.windows import FIELDS, UNIT, UNITS, WINDOW

# Columns of a factor or a result in one step: more would not stay in registers.
CHUNK = 512


def scratch(plan: Plan, x: Any, a: Any, b: Any) -> dict[str, Any]:
    """What is kept between steps: what arrives of each factor, both as they are multiplied, the sum so far."""
    arriving = lambda f: pltpu.VMEM((plan.slots, UNITS, UNIT + stripe(f.dtype), f.shape[1]), f.dtype)  # noqa: E731
    return {
        "arriving_a": arriving(a),
        "arriving_b": arriving(b),
        "arrived": pltpu.SemaphoreType.DMA((plan.slots, 2)),
        "aw": pltpu.VMEM((WINDOW, a.shape[1]), x.dtype),
        "bw": pltpu.VMEM((WINDOW, b.shape[1]), x.dtype),
        "sum": pltpu.VMEM((plan.size, b.shape[1]), jnp.float32),
    }


def body(
    plan: Plan, scalars: Any, rows: Any, x: Any, added: Any, a: Any, b: Any, out: Any, kept: dict[str, Any]
) -> None:
    """One tile of rows.

    rows: `Windows.rows`, (1, 8, lanes). x (size, K); added, which may be None, and out (size, N). a, b: `with_tail`.
    """
    units, tiles = scalars
    tile = pl.program_id(0)
    count, shared, fetched, following, used = (tiles[(tile + 1) * len(FIELDS) + i] for i in range(len(FIELDS)))
    used_by = lambda tile: tiles[(tile + 1) * len(FIELDS) + FIELDS.index("units")]  # noqa: E731
    dtype = x.dtype
    size, total = x.shape[0], kept["sum"]
    factors = ((a, kept["arriving_a"], kept["aw"], 0), (b, kept["arriving_b"], kept["bw"], 1))

    def copies(act: str, window: Any, units_left: Any, number: Any) -> None:
        slot = number & (plan.slots - 1)
        filled = jnp.minimum(units_left, UNITS)
        for factor, arriving, _, which in factors:
            _copy(act, factor, units, window, filled, which, arriving.at[slot], kept["arrived"].at[slot, which])

    @pl.when((tile == 0) & (tiles[3] < plan.tiles))
    def _() -> None:
        copies("start", tiles[3] * plan.most, used_by(tiles[3]), jnp.int32(0))

    # Rows' numbers come along the lanes, and are wanted along the sublanes.
    mine = rows[0].T[:size]
    low, high, weight = mine[:, 0:1], mine[:, 1:2], mine[:, 2:3]

    def step(index: Any, carry: Any) -> Any:
        window, number, left = tile * plan.most + index, fetched + index, used - index * UNITS

        @pl.when(shared == 0)
        def _() -> None:
            last = index + 1 == count

            def fetch_next() -> None:
                @pl.when(~last)
                def _() -> None:
                    copies("start", window + 1, left - UNITS, number + 1)

                @pl.when(last & (following < plan.tiles))
                def _() -> None:
                    copies("start", following * plan.most, used_by(following), number + 1)

            if plan.slots > 1:
                fetch_next()
            copies("wait", window, left, number)
            for _, arriving, settled, which in factors:
                _settle(units, window, which, arriving.at[number & (plan.slots - 1)], settled)
            if plan.slots == 1:
                fetch_next()

        h = _shrink(x, kept["aw"])
        column = (lax.broadcasted_iota(jnp.int32, h.shape, 1) + index * WINDOW).astype(jnp.float32)
        h = jnp.where((column >= low) & (column < high), h * weight, 0.0).astype(dtype)

        def add(at: Any) -> None:
            found = dot(h, kept["bw"][:, at], 0)
            total[:, at] = jnp.where(index == 0, 0.0, total[:, at]) + found

        chunks(total.shape[1], add)
        return carry

    lax.fori_loop(0, count, step, 0)

    def finish(at: Any) -> None:
        change = jnp.where(count > 0, total[:, at], 0.0)
        out[:, at] = (change if added is None else added[:, at].astype(jnp.float32) + change).astype(out.dtype)

    chunks(total.shape[1], finish)


def chunks(size: int, act: Any) -> None:
    """`act` for each part of the columns, the last one shorter."""
    whole = size // CHUNK

    @pl.loop(0, whole)
    def _(index: Any) -> None:
        act(pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK))

    if size % CHUNK:
        act(pl.ds(whole * CHUNK, size % CHUNK))


def dot(left: jax.Array, right: jax.Array, axis: int, left_axis: int = 1) -> jax.Array:
    """left x right, summed over these axes in float32; float32 numbers are not multiplied in less."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    numbers = (((left_axis,), (axis,)), ((), ()))
    return lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=jnp.float32)


def _shrink(x: Any, aw: Any) -> jax.Array:
    size = x.shape[1]
    whole = size // CHUNK

    def part(at: Any) -> jax.Array:
        return dot(x[:, at], aw[:, at], 1)

    def step(index: Any, h: jax.Array) -> jax.Array:
        return h + part(pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK))

    h = jnp.zeros((x.shape[0], WINDOW), jnp.float32)
    h = lax.fori_loop(0, whole, step, h) if whole else h
    return h + part(pl.ds(whole * CHUNK, size % CHUNK)) if size % CHUNK else h


def stripes(row: Any, need: Any, high: int) -> tuple[Any, Any]:
    """The first row of memory's tile that holds `row`, and how many such tiles hold what is needed."""
    shift = row & (high - 1)
    count = lax.div(shift + need + (high - 1), jnp.int32(high))
    return row - shift, jnp.where(need > 0, count, 0)


def with_tail(factor: jax.Array, interpret: Any = False) -> list[jax.Array]:
    """A factor, and its last rows by themselves where they fill no tile of memory, which no copy could take."""
    rest = factor.shape[0] % stripe(factor.dtype)
    tail = [jnp.pad(factor[-rest:], ((0, stripe(factor.dtype) - rest), (0, 0)))] if rest else []
    # Where there is room, XLA would bring all of a factor into VMEM for the few ranks that are read.
    return [factor if interpret else pltpu.with_memory_space_constraint(factor, pltpu.HBM), *tail]


def _copy(act: str, factor: Any, units: Any, window: Any, filled: Any, which: int, arriving: Any, arrived: Any) -> None:
    """Start or wait for the copies of a window's units, one copy each. factor: `with_tail`."""
    factor, *tail = factor
    high, total = stripe(factor.dtype), factor.shape[0]

    @pl.loop(0, filled)
    def _(unit: Any) -> None:
        at = 3 * (window * UNITS + unit)
        begin, count = stripes(units[at + which], units[at + 2], high)
        first = pl.multiple_of(begin, high)
        whole = first + count * high <= total

        def move(source: Any, past: int, rows: int) -> None:
            getattr(pltpu.make_async_copy(source, arriving.at[unit, pl.ds(past, rows)], arrived), act)()

        def at_once(number: int) -> None:
            if number:
                move(factor.at[pl.ds(first, number * high)], 0, number * high)

        def in_parts(number: int) -> None:
            at_once(number - 1)
            move(tail[0], (number - 1) * high, high)

        for number in range(1, 1 + (UNIT + high) // high):
            exact = (count == number) & whole if tail else count == number
            pl.when(exact)(functools.partial(at_once, number))
            if tail:
                pl.when((count == number) & ~whole)(functools.partial(in_parts, number))


def _settle(units: Any, window: Any, which: int, arriving: Any, kept: Any) -> None:
    """What arrived, from the first rank of each unit on, zero where it has none, in the dtype of products."""
    high = arriving.shape[1] - UNIT

    @pl.loop(0, UNITS)
    def _(unit: Any) -> None:
        at = 3 * (window * UNITS + unit)
        need = units[at + 2]
        shift = jnp.where(need > 0, units[at + which] & (high - 1), 0)
        settle(arriving.at[unit], kept.at[pl.ds(pl.multiple_of(unit * UNIT, UNIT), UNIT)], shift, need)


def settle(arriving: Any, kept: Any, shift: Any, need: Any) -> None:
    """16 rows of `kept` from `arriving`, which begins `shift` rows before them; zero after the first `need`."""
    height = arriving.shape[0]

    def store(found: jax.Array, at: Any) -> None:
        rank = lax.broadcasted_iota(jnp.int32, found.shape, 0)
        kept[:, at] = jnp.where(rank < need, found, 0.0).astype(kept.dtype)

    @pl.when(shift == 0)
    def _() -> None:
        chunks(kept.shape[1], lambda at: store(arriving[:UNIT, at].astype(jnp.float32), at))

    @pl.when(shift > 0)
    def _() -> None:
        by = height - shift
        chunks(kept.shape[1], lambda at: store(pltpu.roll(arriving[:, at].astype(jnp.float32), by, 0)[:UNIT], at))
