"""The gradient of a factor on a TPU: g[p] = sum over the groups that own rank p of weight (dy . b[p]) x.

    u = weight (dy bw^T)        acc += u^T x        at the end of an adapter's groups        g[its ranks] += acc

Groups come in order of their adapter (`runs`), so that a sum is made in VMEM and met with HBM once. g begins as zeros
and is one array with them. An adapter may begin within a tile of memory that another one ends in: whole tiles are read
at the beginning of a run, while its groups are multiplied, and written at its end; the next run reads after that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.multi_lora.pallas_tpu_kernel import chunks, dot, settle, stripes, with_tail
from lorax_kernels.multi_lora.pallas_tpu_plan import SPARE, VMEM, GradPlan, stripe
from lorax_kernels.multi_lora.runs import FIELDS, runs
from lorax_kernels.multi_lora.windows import UNIT

# Rows of a tile of float32.
HIGH = 8


def product(
    plan: GradPlan,
    chip: str,
    x: jax.Array,
    dy: jax.Array,
    b: jax.Array,
    start: jax.Array,
    out_start: jax.Array,
    rank: jax.Array,
    weight: jax.Array,
    total: int,
    interpret: Any,
) -> jax.Array:
    """g (total, K) in float32, for x (groups, rows, K) and dy (groups, rows, N)."""
    groups, rows, k = x.shape
    n = b.shape[1]
    table, weight = runs(start, out_start, rank), _by_place(start, out_start, rank, weight)
    # A copy takes 1, 2, 4 or 8 rows of a tile of memory. Others are more rows, and the last are cut off after.
    tiles = total if total % HIGH in (0, 1, 2, 4) else -(-total // HIGH) * HIGH
    zeros, factor = jnp.zeros((tiles, k), jnp.float32), with_tail(b, interpret)
    kept = {
        "arriving": pltpu.VMEM((2, plan.rank + stripe(b.dtype), n), b.dtype),
        "arrived": pltpu.SemaphoreType.DMA((2,)),
        "bw": pltpu.VMEM((plan.rank, n), dy.dtype),
        # A tile of zeros before and after it: it is moved by less than a tile.
        "sum": pltpu.VMEM((HIGH + plan.rank + HIGH, k), jnp.float32),
        "old": pltpu.VMEM((plan.rank + HIGH, k), jnp.float32),
        "moved": pltpu.SemaphoreType.DMA((2,)),
    }

    def block(width: int) -> pl.BlockSpec:
        def index(place: Any, part: Any, table: Any, _: Any) -> Any:
            at = place * len(FIELDS)
            return table[at], jnp.where(table[at + 3] > 0, part, plan.parts - 1), 0

        return pl.BlockSpec((1, plan.size, width), index)

    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)

    def body(table: Any, weight: Any, x: Any, dy: Any, *refs: Any) -> None:
        b, (out, *held) = refs[: len(factor)], refs[len(factor) + 1 :]
        _body(plan, rows, table, weight, x, dy, b, out, dict(zip(kept, held, strict=True)))

    out = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((tiles, k), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(groups, plan.parts),
            in_specs=[block(k), block(n), *[anywhere] * (len(factor) + 1)],
            out_specs=anywhere,
            scratch_shapes=list(kept.values()),
        ),
        input_output_aliases={4 + len(factor): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM[chip] + SPARE
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * groups * rows * plan.rank * (k + n),
            bytes_accessed=groups * rows * (k + n) * x.dtype.itemsize + 4 * groups * plan.rank * (2 * k + n),
            transcendentals=0,
        ),
        interpret=interpret,
        name="multi_lora_grad",
    )(table, weight, x, dy, *factor, zeros)
    return out[:total]


def _by_place(start: Any, out_start: Any, rank: Any, weight: Any) -> jax.Array:
    """The weights in the order of `runs`."""
    groups = rank.shape[0]
    group = runs(start, out_start, rank).reshape(groups, -1)[:, 0]
    at = jnp.arange(groups, dtype=jnp.int32)
    return jnp.sum(jnp.where(group[:, None] == at, weight.astype(jnp.float32), 0.0), axis=-1)


def _body(
    plan: GradPlan, rows: int, table: Any, weight: Any, x: Any, dy: Any, b: Any, out: Any, kept: dict[str, Any]
) -> None:
    place, part = pl.program_id(0), pl.program_id(1)
    field = lambda name, where: table[where * len(FIELDS) + FIELDS.index(name)]  # noqa: E731
    here = lambda name: field(name, place)  # noqa: E731
    groups = pl.num_programs(0)
    old, total = kept["old"], kept["sum"]

    def factor(act: str, where: Any) -> None:
        slot = field("run", where) & 1
        _copy(act, b, kept["arriving"].at[slot], field("row", where), field("rank", where), kept["arrived"].at[slot])

    def result(act: str, where: Any, writes: bool) -> None:
        row, rank, arrived = field("out_row", where), field("rank", where), kept["moved"].at[int(writes)]
        _copy(act, [out], old, row, rank, arrived, writes)

    @pl.when((here("begins") == 1) & (part == 0))
    def _() -> None:
        @pl.when(here("run") == 0)
        def _() -> None:
            factor("start", place)

        @pl.when(here("following") < groups)
        def _() -> None:
            factor("start", here("following"))

        @pl.when(here("run") > 0)
        def _() -> None:
            result("wait", place - 1, True)

        result("start", place, False)
        factor("wait", place)
        _settle(kept["arriving"].at[here("run") & 1], here("row"), here("rank"), kept["bw"])

        def clear(at: Any) -> None:
            total[:, at] = jnp.zeros((total.shape[0], at.size), jnp.float32)

        chunks(total.shape[1], clear)

    @pl.when(here("rank") > 0)
    def _() -> None:
        _add(plan, rows, part, x, dy, kept["bw"], weight[place], total)

    @pl.when((here("ends") == 1) & (part == plan.parts - 1))
    def _() -> None:
        result("wait", place, False)
        shift = here("out_row") & (HIGH - 1)

        @pl.loop(0, _tiles(here("out_row"), here("rank"), HIGH))
        def _(index: Any) -> None:
            top = pl.multiple_of(index * HIGH, HIGH)

            def merge(at: Any) -> None:
                moved = pltpu.roll(total[pl.ds(top, 2 * HIGH), at], shift, 0)[HIGH:]
                old[pl.ds(top, HIGH), at] = old[pl.ds(top, HIGH), at] + moved

            chunks(old.shape[1], merge)

        result("start", place, True)

        @pl.when(here("following") == groups)
        def _() -> None:
            result("wait", place, True)


def _add(plan: GradPlan, rows: int, part: Any, x: Any, dy: Any, bw: Any, weight: Any, total: Any) -> None:
    """The sum of a block of rows added on top."""
    size, dtype = plan.size, x.dtype
    u = jnp.zeros((size, plan.rank), jnp.float32)
    whole, rest = divmod(dy.shape[2], 512)

    def shrink(at: Any) -> jax.Array:
        return dot(dy[0, :, at], bw[:, at], 1)

    u = lax.fori_loop(0, whole, lambda i, u: u + shrink(pl.ds(pl.multiple_of(i * 512, 512), 512)), u) if whole else u
    u = u + shrink(pl.ds(whole * 512, rest)) if rest else u
    u = u * weight
    # The last block ends beyond the last row: what is there may be no number.
    cut = rows % size != 0
    inside = part * size + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < rows
    u = (jnp.where(inside, u, 0.0) if cut else u).astype(dtype)

    def expand(at: Any) -> None:
        right = x[0, :, at]
        right = jnp.where(inside, right, jnp.zeros((), dtype)) if cut else right
        middle = pl.ds(HIGH, plan.rank)
        total[middle, at] = total[middle, at] + dot(u, right, 0, 0)

    chunks(total.shape[1], expand)


def _tiles(row: Any, rank: Any, high: int) -> Any:
    return stripes(row, rank, high)[1]


def _copy(act: str, array: Any, held: Any, row: Any, rank: Any, arrived: Any, writes: bool = False) -> None:
    """Start or wait for copies of the tiles of memory that hold the ranks from `row` on. array: `with_tail`, or one."""
    array, *tail = array
    high, end = stripe(array.dtype), array.shape[0]
    begin, count = stripes(row, rank, high)
    rest = end % high

    @pl.loop(0, count)
    def _(index: Any) -> None:
        first = pl.multiple_of(begin + index * high, high)
        top = pl.multiple_of(index * high, high)

        def move(far: Any, rows: int) -> None:
            near = held.at[pl.ds(top, rows)]
            source, target = (near, far) if writes else (far, near)
            getattr(pltpu.make_async_copy(source, target, arrived), act)()

        def at_the_end() -> None:
            if tail:
                move(tail[0], high)
            else:
                move(array.at[pl.ds(first, rest)], rest)

        def within() -> None:
            move(array.at[pl.ds(first, high)], high)

        if rest:
            pl.when(first + high > end)(at_the_end)
            pl.when(first + high <= end)(within)
        else:
            within()


def _settle(arriving: Any, row: Any, rank: Any, kept: Any) -> None:
    """The adapter's ranks from the top on, zero behind them, in the dtype of products."""
    high = arriving.shape[0] - kept.shape[0]
    shift = row & (high - 1)

    @pl.loop(0, kept.shape[0] // UNIT)
    def _(unit: Any) -> None:
        top = pl.multiple_of(unit * UNIT, UNIT)
        settle(arriving.at[pl.ds(top, UNIT + high)], kept.at[pl.ds(top, UNIT)], shift, rank - top)
