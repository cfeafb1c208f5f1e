"""The body of the fused products: x @ W or dy @ W^T with a 4-bit W, and the low-rank term in the same pass.

    y = x W + scale (x A) B        h = x A

Steps go through the grid (chunk of rows, part of C, block of F, block of rows). What is kept between steps:

    arriving[slot]  rows of x for this part of C, copied from HBM while those before are multiplied
    pairs[m]        where the plan says so, the same rows as int32 pairs, made when f == 0
    w               the dequantised block of W, made when m == 0
    partial[f, m]   the sum over the parts of C so far, where there are several
    h[m]            x A of the chunk, made when f == 0
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.nf4_matmul.layout_tpu import GROUP_ROWS, LANES
from lorax_kernels.nf4_matmul.pallas_tpu_lookup import codebook, dequantise_block
from lorax_kernels.nf4_matmul.pallas_tpu_plan import VMEM, Plan

_SPARE = 8 << 20


def product(
    plan: Plan,
    chip: str,
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lora: tuple[jax.Array, jax.Array, jax.Array] | None,
    width: int,
    interpret: Any,
) -> list[jax.Array]:
    """[y], or [y, h].

    x: [plan.rows, plan.contracted]. lora: its factors in x's dtype, padded like W, as they multiply W's own axes: a
    [K, r], b [r, N]; and scale float32 [1, 1]. width: the columns of y, at most plan.free.
    """
    _, steps, blocks, inner = plan.grid
    last = steps - 1
    out_shape = [jax.ShapeDtypeStruct((plan.rows, width), x.dtype)]
    # Partial sums stay in VMEM: until the last part of C the block of y does not move, and so is not written.
    at_last = lambda c, value: value if last == 0 else jnp.where(c == last, value, 0)  # noqa: E731
    out_specs = [
        pl.BlockSpec((plan.bm, plan.bf), lambda i, c, f, m: (i * inner + at_last(c, m), at_last(c, f))),
    ]
    w_index = (lambda i, c, f, m: (f, c)) if plan.transposed else (lambda i, c, f, m: (c, f))
    w_rows, w_columns = plan.w_block
    in_specs = [
        pl.BlockSpec((16, LANES), lambda i, c, f, m: (0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
        pl.BlockSpec((w_rows // 8, w_columns), w_index),
        pl.BlockSpec((-(-w_rows // GROUP_ROWS), 8, w_columns), lambda i, c, f, m: (*_first(w_index(i, c, f, m)),)),
    ]
    wide = x.dtype == jnp.float32
    scratch = {
        "arriving": pltpu.VMEM((plan.slots, plan.held, plan.bm, plan.bc), x.dtype),
        "arrived": pltpu.SemaphoreType.DMA((plan.slots, plan.held)),
        "w": pltpu.VMEM((w_rows, w_columns), jnp.float32) if wide else pltpu.VMEM((w_rows // 2, w_columns), jnp.int32),
    }
    if plan.paired:
        scratch["pairs"] = pltpu.VMEM((inner, plan.bm // 2, plan.bc), jnp.int32)
    if steps > 1:
        scratch["partial"] = pltpu.VMEM((blocks, inner, plan.bm, plan.bf), jnp.float32)
    operands = [codebook(chip, x.dtype), x, words, scales]
    if lora is not None:
        a, b, scale = lora
        first, second = (b, a) if plan.transposed else (a, b)
        operands += [first, second, scale]
        part = lambda i, c, f, m: c  # noqa: E731
        block = lambda i, c, f, m: at_last(c, f)  # noqa: E731
        in_specs += [
            _factor((plan.bc, plan.rank), part, plan.transposed),
            _factor((plan.bf, plan.rank), block, not plan.transposed),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ]
        scratch["h"] = pltpu.VMEM((inner, plan.bm, plan.rank), jnp.float32)
        out_shape.append(jax.ShapeDtypeStruct((plan.rows, plan.rank), jnp.float32))
        # h is written while f == 0 and its block rests on the last one after that.
        out_specs.append(
            pl.BlockSpec(
                (plan.bm, plan.rank), lambda i, c, f, m: (i * inner + at_last(c, jnp.where(f == 0, m, inner - 1)), 0)
            )
        )

    def body(*refs: Any) -> None:
        inputs, outputs = refs[: len(operands)], refs[len(operands) : len(operands) + len(out_shape)]
        _body(plan, chip, inputs, outputs, dict(zip(scratch, refs[len(operands) + len(out_shape) :], strict=True)))

    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=plan.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=VMEM[chip] + _SPARE
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.rows * plan.contracted * (plan.free + plan.rank) + 2 * plan.rows * plan.rank * plan.free,
            bytes_accessed=sum(plan.moved().values()),
            transcendentals=0,
        ),
        interpret=interpret,
        name="nf4_matmul_t" if plan.transposed else "nf4_matmul",
    )(*operands)


def _first(index: tuple[Any, Any]) -> tuple[Any, int, Any]:
    """The index of the scales' block from that of the words'."""
    return index[0], 0, index[1]


def _factor(shape: tuple[int, int], where: Any, flipped: bool) -> pl.BlockSpec:
    """A block of a factor (rows, rank), or (rank, rows)."""
    if flipped:
        return pl.BlockSpec(shape[::-1], lambda *ids: (0, where(*ids)))
    return pl.BlockSpec(shape, lambda *ids: (where(*ids), 0))


def _body(plan: Plan, chip: str, inputs: Any, outputs: Any, scratch: dict[str, Any]) -> None:
    table, x, words, scales = inputs[:4]
    steps = plan.grid[1]
    i, c, f, m = (pl.program_id(axis) for axis in range(4))
    part = i * steps + c
    arriving = scratch["arriving"]

    @pl.when(f == 0)
    def _() -> None:
        _bring(plan, part, m, x, arriving, scratch["arrived"])
        if plan.paired:
            _pair(arriving.at[(part * plan.grid[3] + m) & (plan.slots - 1), 0], scratch["pairs"].at[m])

    @pl.when(m == 0)
    def _() -> None:
        dequantise_block(words, scales, table, scratch["w"], chip, plan.w_block[1])

    dtype = x.dtype
    dot = _dot(plan.transposed, dtype)
    slot = part & (plan.slots - 1)
    rows = lambda: pltpu.bitcast(scratch["pairs"][m], dtype) if plan.paired else arriving[slot, m]  # noqa: E731
    if plan.rank:
        first, _, scale = inputs[4:]
        h = scratch["h"]

        @pl.when(f == 0)
        def _() -> None:
            found = dot(rows(), first[...])
            h[m] = found if steps == 1 else jnp.where(c == 0, 0.0, h[m]) + found

        @pl.when((f == 0) & (c == steps - 1))
        def _() -> None:
            outputs[1][...] = h[m]

    # One tile of columns at a time: the sums of a whole block do not fit the registers.
    tile = next(width for width in (1024, 512, 256, LANES) if plan.bf % width == 0)

    @pl.loop(0, plan.bf // tile)
    def _(index: Any) -> None:
        start = pl.multiple_of(index * tile, tile)
        y = dot(rows(), _weights(plan, scratch["w"], start, tile, dtype))

        def finish(total: jax.Array) -> None:
            if plan.rank:
                second = inputs[5][pl.ds(start, tile), :] if plan.transposed else inputs[5][:, pl.ds(start, tile)]
                total = total + dot((h[m] * scale[0, 0]).astype(dtype), second)
            outputs[0][:, pl.ds(start, tile)] = total.astype(dtype)

        if steps == 1:
            finish(y)
            return
        partial = scratch["partial"].at[f, m, :, pl.ds(start, tile)]
        partial[...] = jnp.where(c == 0, 0.0, partial[...]) + y

        @pl.when(c == steps - 1)
        def _() -> None:
            finish(partial[...])


def _weights(plan: Plan, w: Any, start: Any, tile: int, dtype: Any) -> jax.Array:
    """The part of the dequantised block that makes `tile` columns of y, in dtype."""
    if not plan.transposed:
        part = w[:, pl.ds(start, tile)]
    elif dtype == jnp.float32:
        part = w[pl.ds(start, tile), :]
    else:
        part = w[pl.ds(pl.multiple_of(lax.div(start, 2), tile // 2), tile // 2), :]
    return part if dtype == jnp.float32 else pltpu.bitcast(part, dtype)


def _bring(plan: Plan, part: Any, m: Any, x: Any, arriving: Any, arrived: Any) -> None:
    """Wait for block m of this part of x; with the first one of a slot, fill the next slot."""
    steps, inner = plan.grid[1], plan.grid[3]
    # A slot holds a part, or one block where pairs hold the part.
    fills, index = (part, m) if plan.held == inner else (part * inner + m, jnp.int32(0))
    blocks = 1 if plan.held == inner else inner

    def copy(fills: Any, index: Any) -> Any:
        part = lax.div(fills, jnp.int32(blocks))
        m = lax.rem(fills, jnp.int32(blocks)) + index
        i, c = lax.div(part, jnp.int32(steps)), lax.rem(part, jnp.int32(steps))
        source = x.at[pl.ds((i * inner + m) * plan.bm, plan.bm), pl.ds(c * plan.bc, plan.bc)]
        where = fills & (plan.slots - 1), index
        return pltpu.make_async_copy(source, arriving.at[where], arrived.at[where])

    def fill(fills: Any) -> None:
        @pl.loop(0, plan.held)
        def _(index: Any) -> None:
            copy(fills, index).start()

    @pl.when((index == 0) & (fills == 0))
    def _() -> None:
        fill(fills)

    if plan.slots > 1:

        @pl.when((index == 0) & (fills + 1 < plan.rows // plan.bm * steps // plan.held))
        def _() -> None:
            fill(fills + 1)

    copy(fills, index).wait()


def _pair(rows: Any, pairs: Any) -> None:
    """bf16 rows to int32 pairs of them."""
    step = 32 if rows.shape[0] % 32 == 0 else 16

    @pl.loop(0, rows.shape[0] // step)
    def _(index: Any) -> None:
        values = rows[pl.ds(pl.multiple_of(index * step, step), step), :]
        pairs[pl.ds(pl.multiple_of(index * (step // 2), step // 2), step // 2), :] = pltpu.bitcast(values, jnp.int32)


def _dot(transposed: bool, dtype: Any) -> Any:
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lambda left, right: lax.dot_general(
        left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
