"""`multi_lora` on a TPU (Pallas/Mosaic): y[g] + weight[g] (x[g] a[ranks]^T) b[ranks].

Rows are taken as they come, in tiles that meet the ranks of all their adapters side by side (`windows`): a batch of one
token a request is one tile, and a training batch is tiles of a few examples each. Only where groups are shorter than 16
rows and there is more than one tile are rows put in order of their adapter, which copies x and the result once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.dispatch import current_target
from lorax_kernels.multi_lora import pallas_tpu_grad
from lorax_kernels.multi_lora import pallas_tpu_kernel as kernel
from lorax_kernels.multi_lora.pallas_tpu_plan import FEWEST_ROWS, SPARE, VMEM, Plan, grad_plan, plan
from lorax_kernels.multi_lora.windows import WINDOW, Windows, windows

_DTYPES = ("bfloat16", "float32")


def refuse(op: str, m: int, k: int, n: int, dtype: Any, rank: int, groups: int, total: int, chip: str) -> str | None:
    """Why `op` (`multi_lora`, `multi_lora_grad`) does not serve a case, in words; None if it does."""
    if chip not in VMEM:
        return f"chip {chip or 'unknown'!r} is none of {', '.join(VMEM)}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"dtype {jnp.dtype(dtype).name}; the kernel takes {' and '.join(_DTYPES)}"
    if min(m, k, n, rank, groups, total) < 1:
        return f"an empty product: {m} rows in {groups} groups, k = {k}, n = {n}, rank {rank} of {total}"
    rows = m // groups
    if op == "multi_lora_grad" and rows < FEWEST_ROWS:
        return f"sums over groups of {rows} rows, and blocks of fewer than {FEWEST_ROWS} leave a matrix unit idle"
    if op == "multi_lora_grad" and grad_plan(rows, k, n, rank, dtype, jnp.float32, chip) is None:
        return f"no blocks of k = {k}, n = {n}, rank {rank} fit the VMEM of {chip}"
    if op == "multi_lora" and plan(groups, rows, k, n, rank, dtype, jnp.float32, jnp.float32, chip) is None:
        return f"no tiles of k = {k}, n = {n}, rank {rank} fit the memories of {chip}"
    return None


def apply(
    y: Any,
    x: Any,
    a: Any,
    b: Any,
    a_start: Any,
    b_start: Any,
    rank: Any,
    weight: Any,
    options: Any,
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As `primitive.apply`.

    chip: the generation compiled for; by default what the program is traced for. interpret:
    `pltpu.InterpretParams(...)` runs it on a CPU.
    """
    chip = current_target()[1] if chip is None else chip
    groups, rows, k = x.shape
    n, bound = b.shape[1], min(options.max_rank, a.shape[0], b.shape[0])
    cut = plan(groups, rows, k, n, bound, x.dtype, options.dtype, _wider(a, b), chip)
    assert cut is not None, "refuse names what has no plan"
    flat, added = x.reshape(-1, k), None if y is None else y.reshape(-1, n)
    route = (a_start, b_start, rank, weight)
    if not cut.sorts:
        found = windows(*route, rows, cut.size, bound)
        return _product(cut, chip, found, flat, added, a, b, options.dtype, interpret).reshape(groups, rows, n)
    each = [jnp.broadcast_to(z[:, None], (groups, rows)).reshape(-1) for z in route]
    order = jnp.lexsort((each[1], each[0], each[2] <= 0))
    first, second, ranks, weights = (z[order] for z in each)
    found = windows(first, second, ranks, weights, 1, cut.size, bound)
    out = _product(cut, chip, found, flat[order], None, a, b, options.dtype, interpret)
    out = out[jnp.argsort(order)]
    return (out if added is None else added + out).reshape(groups, rows, n)


def grad(
    x: Any,
    dy: Any,
    b: Any,
    b_start: Any,
    out_start: Any,
    rank: Any,
    weight: Any,
    options: Any,
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As `primitive.grad`."""
    chip = current_target()[1] if chip is None else chip
    bound = min(options.max_rank, b.shape[0], options.total)
    dtype = x.dtype if x.dtype.itemsize >= dy.dtype.itemsize else dy.dtype
    cut = grad_plan(x.shape[1], x.shape[2], dy.shape[2], bound, dtype, b.dtype, chip)
    assert cut is not None, "refuse names what has no plan"
    route = (b_start, out_start, rank, weight)
    out = pallas_tpu_grad.product(cut, chip, x, dy, b, *route, options.total, interpret)
    return out.astype(options.dtype)


def _wider(a: Any, b: Any) -> Any:
    return max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def _product(
    cut: Plan, chip: str, found: Windows, x: Any, added_to: Any, a: Any, b: Any, dtype: Any, interpret: Any
) -> jax.Array:
    """x and the result by rows, in the order of `found`."""
    scalars = (found.units, found.tiles)
    m, k, n = x.shape[0], x.shape[1], b.shape[1]
    factors = [kernel.with_tail(factor, interpret) for factor in (a, b)]
    inputs = [found.rows, x, *([] if added_to is None else [added_to]), *factors[0], *factors[1]]
    kept = kernel.scratch(cut, x, a, b)
    by_tile = lambda width: pl.BlockSpec((cut.size, width), lambda tile, *_: (tile, 0))  # noqa: E731
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)

    def body(*refs: Any) -> None:
        numbers, refs = refs[: len(scalars)], refs[len(scalars) :]
        (rows, x, *more), out, held = refs[: len(inputs)], refs[len(inputs)], refs[len(inputs) + 1 :]
        added = None if added_to is None else more.pop(0)
        a, b = more[: len(factors[0])], more[len(factors[0]) :]
        kernel.body(cut, numbers, rows, x, added, a, b, out, dict(zip(kept, held, strict=True)))

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((m, n), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cut.tiles,),
            in_specs=[
                pl.BlockSpec((1, *found.rows.shape[1:]), lambda tile, *_: (tile, 0, 0)),
                by_tile(k),
                *([] if added_to is None else [by_tile(n)]),
                *[anywhere for factor in factors for _ in factor],
            ],
            out_specs=by_tile(n),
            scratch_shapes=list(kept.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM[chip] + SPARE),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * WINDOW * (k + n),
            bytes_accessed=m * (k + 2 * n) * x.dtype.itemsize + cut.tiles * WINDOW * (k + n) * a.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="multi_lora",
    )(*scalars, *inputs)
