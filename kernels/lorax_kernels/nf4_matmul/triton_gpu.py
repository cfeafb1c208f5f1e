"""Products with an NF4 weight on an NVIDIA GPU (Triton through jax-triton): dequantise, x @ W, dy @ W^T.

    matmul      y  = x deq(W) + scale (x A) B           h  = x A
    matmul_t    dx = dy deq(W)^T + scale (dy B^T) A^T    dh = dy B^T

W is in bitsandbytes' bytes. It is dequantised in registers, tile by tile, and never reaches memory. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from lorax_kernels.dispatch import current_target
from lorax_kernels.nf4_matmul.triton_plan import Plan, plan

CHIPS = ("sm_80", "sm_90", "sm_100")
BLOCK_SIZES = (32, 64, 128, 256)
_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_RANK = 128

Lora = tuple[jax.Array, jax.Array, Any]


def refuse(op: str, m: int, k: int, n: int, dtype: Any, block_size: int, rank: int, chip: str) -> str | None:
    """Why `op` (`nf4_dequantise`, `nf4_matmul`, `nf4_matmul_t`) does not serve a case, in words; None if it does."""
    if chip and _capability(chip) < 80:
        return f"chip {chip}: the kernels are for sm_80 and later"
    if block_size not in BLOCK_SIZES:
        return f"block size {block_size}; the kernels take {', '.join(map(str, BLOCK_SIZES))}"
    if k % block_size:
        return f"k = {k} is not whole blocks of {block_size}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"dtype {jnp.dtype(dtype).name}; the kernels take {', '.join(_DTYPES)}"
    if op != "nf4_dequantise" and min(m, n) < 1:
        return f"an empty product: m = {m}, n = {n}"
    if rank > _LARGEST_RANK:
        return f"rank {rank} is above {_LARGEST_RANK}: its partial sums do not fit the registers"
    return None


def dequantize(
    codes: UInt8[Array, "n k_half"], scales: Float32[Array, "n blocks"], dtype: Any, block_size: int = 64
) -> Float[Array, "n k"]:
    """W^T [n, k]; each value is the float32 product of codebook and scale, rounded once.

    Raises:
        ValueError: a case that `refuse` names.
    """
    from lorax_kernels.nf4_matmul import triton_kernels

    n, k = codes.shape[0], 2 * codes.shape[1]
    _check("nf4_dequantise", 1, k, n, dtype, block_size, 0)
    return _call(
        triton_kernels.dequantise,
        (codes, scales),
        jax.ShapeDtypeStruct((n, k), dtype),
        (-(-n // 32), -(-k // 128)),
        dict(N=n, K=k, BS=block_size, BN=32, BK=128, num_warps=4),
    )


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "n k_half"],
    scales: Float32[Array, "n blocks"],
    *,
    lora: Lora | None = None,
    block_size: int = 64,
) -> Float[Array, "m n"] | tuple[Float[Array, "m n"], Float32[Array, "m r"]]:
    """x @ W in x's dtype; with `lora = (a [k, r], b [r, n], scale)` the pair (x @ W + scale (x @ a) @ b, x @ a).

    Args:
        x: float32, bfloat16 or float16, any number of rows.
        codes, scales: W^T by rows, as bitsandbytes holds it; scales of one level.
        lora: factors, which are multiplied in x's dtype, and a scalar.
        block_size: 32, 64, 128 or 256.

    Raises:
        ValueError: a case that `refuse` names.
    """
    return _run("nf4_matmul", x, codes, scales, lora, block_size)


def matmul_t(
    dy: Float[Array, "m n"],
    codes: UInt8[Array, "n k_half"],
    scales: Float32[Array, "n blocks"],
    *,
    lora: Lora | None = None,
    block_size: int = 64,
) -> Float[Array, "m k"] | tuple[Float[Array, "m k"], Float32[Array, "m r"]]:
    """dy @ W^T in dy's dtype; with `lora` also the low-rank term, and dy @ b^T. Arguments as for `matmul`."""
    return _run("nf4_matmul_t", dy, codes, scales, lora, block_size)


def _run(op: str, x: jax.Array, codes: jax.Array, scales: jax.Array, lora: Lora | None, block_size: int) -> Any:
    from lorax_kernels.nf4_matmul import triton_kernels

    transposed = op == "nf4_matmul_t"
    m, n, k = x.shape[0], codes.shape[0], 2 * codes.shape[1]
    rank = 0 if lora is None else lora[0].shape[1]
    _check(op, m, k, n, x.dtype, block_size, rank)
    chip = current_target()[1]
    tiles = plan(transposed, m, k, n, x.dtype.itemsize, rank, _capability(chip) if chip else 90)
    a, b, scale = _factors(lora, tiles.rank, x.dtype)
    partial = tiles.split > 1
    outs = (
        jax.ShapeDtypeStruct((tiles.split, m, tiles.free), jnp.float32 if partial else x.dtype),
        jax.ShapeDtypeStruct((tiles.split, m, max(tiles.rank, 1)), jnp.float32),
    )
    kernel = triton_kernels.product_t if transposed else triton_kernels.product
    y, h = _call(kernel, (x, codes, scales, a, b, scale), outs, tiles.grid, constants(tiles, m, k, n, block_size))
    h = jnp.sum(h, axis=0)
    if not partial:
        return y[0] if lora is None else (y[0], h[:, :rank])
    y = jnp.sum(y, axis=0)
    if lora is not None:
        second = a.T if transposed else b
        change = jnp.matmul((h * scale[0]).astype(x.dtype), second, preferred_element_type=jnp.float32)
        return (y + change).astype(x.dtype), h[:, :rank]
    return y.astype(x.dtype)


def constants(tiles: Plan, m: int, k: int, n: int, block_size: int) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    bn, bk = tiles.block_free, tiles.block_contracted
    if tiles.transposed:
        bn, bk = bk, bn
    # float32 is multiplied as three TF32 products; less would not be float32.
    precision = "tf32x3" if tiles.itemsize == 4 else "tf32"
    shapes = dict(M=m, N=n, K=k, BS=block_size, R=tiles.rank, SPLIT=tiles.split)
    launch = dict(num_warps=tiles.warps, num_stages=tiles.stages)
    return shapes | dict(BM=tiles.block_rows, BN=bn, BK=bk, PRECISION=precision) | launch


def _factors(lora: Lora | None, rank: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A, B and the scale as a kernel takes them: the rank padded with zeros, one number where there is no change."""
    if lora is None:
        return jnp.zeros((1, 1), dtype), jnp.zeros((1, 1), dtype), jnp.zeros((1,), jnp.float32)
    a, b, scale = lora
    spare = rank - a.shape[1]
    a, b = jnp.pad(a.astype(dtype), ((0, 0), (0, spare))), jnp.pad(b.astype(dtype), ((0, spare), (0, 0)))
    return a, b, jnp.asarray(scale, jnp.float32).reshape(1)


def _call(kernel: Any, args: tuple[Any, ...], outs: Any, grid: tuple[int, ...], settings: dict[str, Any]) -> Any:
    import jax_triton  # pyright: ignore[reportMissingImports]

    chip = current_target()[1]
    more = {"compute_capability": _capability(chip)} if chip else {}
    return jax_triton.triton_call(*args, kernel=kernel, out_shape=outs, grid=grid, **settings, **more)


def _capability(chip: str) -> int:
    return int(chip.removeprefix("sm_").rstrip("af"))


def _check(op: str, m: int, k: int, n: int, dtype: Any, block_size: int, rank: int) -> None:
    why = refuse(op, m, k, n, dtype, block_size, rank, "")
    if why is not None:
        raise ValueError(f"{op}: {why}")
