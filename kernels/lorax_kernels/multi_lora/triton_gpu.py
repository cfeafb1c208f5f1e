"""`multi_lora` on an NVIDIA GPU (Triton through jax-triton): both operations, two launches each.

    apply    h = w (x a^T), y += h b           grad    h = w (dy b^T), g += h^T x

Rows are taken in order of their adapter by number (`tiles`), so x and y are never copied; what lies between the two
launches is h, (rows, max_rank) in float32. Products are made in x's dtype and summed in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels.dispatch import current_target
from lorax_kernels.multi_lora.tiles import Tiles, tiles
from lorax_kernels.multi_lora.triton_plan import COLUMNS, Plan, plan

CHIPS = ("sm_80", "sm_90", "sm_100")
_DTYPES = ("float32", "bfloat16", "float16")


def refuse(op: str, m: int, k: int, n: int, dtype: Any, rank: int, groups: int, chip: str) -> str | None:
    """Why `op` (`multi_lora`, `multi_lora_grad`) does not serve a case, in words; None if it does."""
    if chip and _capability(chip) < 80:
        return f"chip {chip}: the kernels are for sm_80 and later"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"dtype {jnp.dtype(dtype).name}; the kernels take {', '.join(_DTYPES)}"
    if min(m, k, n, rank, groups) < 1:
        return f"an empty product: {m} rows in {groups} groups, k = {k}, n = {n}, rank {rank}"
    return None


def apply(
    y: Any, x: Any, a: Any, b: Any, a_start: Any, b_start: Any, rank: Any, weight: Any, options: Any
) -> jax.Array:
    """y[g] + weight[g] (x[g] a[ranks]^T) b[ranks], as `primitive.apply`."""
    groups, rows, k = x.shape
    cut = plan(groups, rows, k, b.shape[1], options.max_rank, x.dtype.itemsize)
    found = tiles(a_start, b_start, rank, rows, cut.block_rows)
    flat = x.reshape(-1, k)
    h = _shrink(cut, found, flat, a, weight, rows)
    out = jnp.zeros((cut.rows, cut.free), options.dtype) if y is None else y.reshape(cut.rows, -1)
    out = _expand(cut, found, h, b, flat, out)
    return out.reshape(groups, rows, -1)


def grad(x: Any, dy: Any, b: Any, b_start: Any, out_start: Any, rank: Any, weight: Any, options: Any) -> jax.Array:
    """Each rank's sum over its rows of weight (dy . b[rank]) x, as `primitive.grad`."""
    groups, rows, n = dy.shape
    itemsize = max(x.dtype.itemsize, dy.dtype.itemsize)
    cut = plan(groups, rows, n, x.shape[2], options.max_rank, itemsize)
    found = tiles(b_start, out_start, rank, rows, cut.block_rows)
    h = _shrink(cut, found, dy.reshape(-1, n), b, weight, rows)
    out = _grad(cut, found, h, x.reshape(-1, x.shape[2]), options.total)
    return out.astype(options.dtype)


def _shrink(cut: Plan, found: Tiles, x: jax.Array, factor: jax.Array, weight: jax.Array, rows: int) -> jax.Array:
    from lorax_kernels.multi_lora import triton_kernels

    shape = jax.ShapeDtypeStruct((cut.split, cut.rows, cut.rank), jnp.float32)
    args = (x, factor, found.order, found.first, found.rows, found.start, found.rank)
    args = (*args, weight.astype(jnp.float32), found.count)
    parts = _call(triton_kernels.shrink, args, shape, cut.grids["shrink"], constants("shrink", cut, rows))
    return jnp.sum(parts, axis=0)


def _expand(cut: Plan, found: Tiles, h: jax.Array, factor: jax.Array, like: jax.Array, y: jax.Array) -> jax.Array:
    from lorax_kernels.multi_lora import triton_kernels

    args = (h, factor, like, found.order, found.first, found.rows, found.other, found.rank, found.count, y)
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    settings = constants("expand", cut)
    return _call(triton_kernels.expand, args, shape, cut.grids["expand"], settings, {len(args) - 1: 0})


def _grad(cut: Plan, found: Tiles, h: jax.Array, x: jax.Array, total: int) -> jax.Array:
    from lorax_kernels.multi_lora import triton_kernels

    zeros = jnp.zeros((total, x.shape[1]), jnp.float32)
    args = (h, x, found.order, found.first, found.rows, found.other, found.rank)
    args = (*args, found.run, found.run_tiles, found.runs, zeros)
    shape = jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
    return _call(triton_kernels.grad, args, shape, cut.grids["grad"], constants("grad", cut), {len(args) - 1: 0})


def constants(kernel: str, cut: Plan, rows: int = 1) -> dict[str, Any]:
    """A kernel's compile-time arguments. rows: of a group."""
    # float32 is multiplied as three TF32 products; less would not be float32.
    precision = "tf32x3" if cut.itemsize == 4 else "tf32"
    shared = dict(R=cut.rank, GRID=cut.grids[kernel][0], BM=cut.block_rows, BR=cut.block_rank, PRECISION=precision)
    # A few rows are too few for eight warps to load sixteen bytes each.
    shared |= dict(num_warps=4 if cut.block_rows == 16 and kernel != "expand" else 8, num_stages=2)
    if kernel == "shrink":
        return shared | dict(M=cut.rows, T=rows, K=cut.contracted, SPLIT=cut.split, BK=cut.block_contracted)
    if kernel == "expand":
        return shared | dict(N=cut.free, BN=COLUMNS[kernel])
    return shared | dict(K=cut.free, BK=COLUMNS[kernel])


def _call(
    kernel: Any, args: tuple[Any, ...], out: Any, grid: Any, settings: dict[str, Any], aliases: Any = None
) -> jax.Array:
    import jax_triton  # pyright: ignore[reportMissingImports]

    chip = current_target()[1]
    more = {"compute_capability": _capability(chip)} if chip else {}
    return jax_triton.triton_call(
        *args, kernel=kernel, out_shape=out, grid=grid, input_output_aliases=aliases, **settings, **more
    )


def _capability(chip: str) -> int:
    return int(chip.removeprefix("sm_").rstrip("af"))
