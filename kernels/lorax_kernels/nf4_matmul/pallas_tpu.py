"""Products with an NF4 weight on a TPU (Pallas/Mosaic): dequantise, x @ W, dy @ W^T, each with its low-rank term.

    matmul      y  = x deq(W) + scale (x A) B           h  = x A
    matmul_t    dx = dy deq(W)^T + scale (dy B^T) A^T    dh = dy B^T

W is in the order of `layout_tpu`. Blocks of it are dequantised in VMEM, once for each chunk of rows, and never reach
HBM. bf16 or float32 activations; sums are float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from lorax_kernels.nf4_matmul.layout_tpu import BLOCK, GROUP_ROWS, LANES, padded
from lorax_kernels.nf4_matmul.pallas_tpu_kernel import product
from lorax_kernels.nf4_matmul.pallas_tpu_lookup import CHIPS, codebook, dequantise_block
from lorax_kernels.nf4_matmul.pallas_tpu_plan import Plan, plan

Words = Int32[Array, "words n_padded"]
Scales = Float32[Array, "groups 8 n_padded"]
Lora = tuple[jax.Array, jax.Array, Any]

_DTYPES = ("bfloat16", "float32")
_LARGEST_RANK = 512
_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "7x": "tpu7x"}


def chip_of(device: jax.Device | None = None) -> str:
    """The generation of a TPU (by default the first device): `"v5e"`, `"v5p"`, `"v6e"` or `"tpu7x"`.

    Raises:
        ValueError: no TPU of these.
    """
    found: Any = jax.devices()[0] if device is None else device
    kind = found.device_kind.lower()
    chip = next((chip for word, chip in _KINDS.items() if word in kind), None)
    if found.platform != "tpu" or chip is None:
        raise ValueError(f"{found.device_kind!r} is no TPU with a codebook lookup; pass chip= as one of {CHIPS}")
    return chip


def refuse(op: str, m: int, k: int, n: int, dtype: Any, block_size: int, rank: int, chip: str) -> str | None:
    """Why `op` (`nf4_dequantise`, `nf4_matmul`, `nf4_matmul_t`) does not serve a case, in words; None if it does."""
    dtype = jnp.dtype(dtype)
    if chip not in CHIPS:
        return f"chip {chip or 'unknown'!r} has no codebook lookup; served are {', '.join(CHIPS)}"
    if block_size != BLOCK:
        return f"block size {block_size}; the kernels take blocks of {BLOCK}"
    if k % BLOCK:
        return f"k = {k} is not whole blocks of {BLOCK}"
    if dtype.name not in _DTYPES:
        return f"dtype {dtype.name}; the kernels take {' and '.join(_DTYPES)}"
    if op == "nf4_dequantise":
        return None
    if min(m, n) < 1:
        return f"an empty product: m = {m}, n = {n}"
    if rank > _LARGEST_RANK:
        return f"rank {rank} is above {_LARGEST_RANK}"
    if plan(op == "nf4_matmul_t", m, k, n, dtype.itemsize, rank, chip) is None:
        return f"no blocks of m = {m}, k = {k}, n = {n} fit the VMEM of {chip}"
    return None


def dequantize(
    words: Words, scales: Scales, k: int, n: int, dtype: Any, *, chip: str | None = None, interpret: Any = False
) -> Float[Array, "k n"]:
    """W [k, n] in bfloat16 or float32; each value is the float32 product of codebook and scale, rounded once.

    Args:
        words, scales: from `layout_tpu.pack`.
        k, n: the shape of W.
        chip: the generation compiled for; by default the first device's.
        interpret: `pltpu.InterpretParams(...)` runs it on a CPU.

    Raises:
        ValueError: a case that `refuse` names.
    """
    chip = chip_of() if chip is None else chip
    _check("nf4_dequantise", 1, k, n, dtype, 0, chip, words, scales)
    dtype = jnp.dtype(dtype)
    kp, np_ = padded(k, n)
    groups = kp // GROUP_ROWS
    rows = GROUP_ROWS * next(some for some in (8, 7, 6, 5, 4, 3, 2, 1) if groups % some == 0)
    # In one tile of columns the halves of a bf16 tile follow each other, and a register of pairs is stored at once.
    columns = LANES
    # The interpreter has no refs of another type: there the same values are stored as bf16.
    in_pairs = dtype == jnp.bfloat16 and not interpret

    def body(table: Any, words: Any, scales: Any, out: Any) -> None:
        dequantise_block(words, scales, table, out.bitcast(jnp.int32) if in_pairs else out, chip, columns)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((k, n), dtype),
        grid=(kp // rows, np_ // columns),
        in_specs=[
            pl.BlockSpec((16, LANES), lambda i, j: (0, 0)),
            pl.BlockSpec((rows // 8, columns), lambda i, j: (i, j)),
            pl.BlockSpec((rows // GROUP_ROWS, 8, columns), lambda i, j: (i, 0, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="nf4_dequantise",
    )(codebook(chip, dtype), words, scales)


def matmul(
    x: Float[Array, "m k"],
    words: Words,
    scales: Scales,
    *,
    n: int,
    lora: Lora | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> Float[Array, "m n"] | tuple[Float[Array, "m n"], Float32[Array, "m r"]]:
    """x @ W in x's dtype; with `lora = (a [k, r], b [r, n], scale)` the pair (x @ W + scale (x @ a) @ b, x @ a).

    Args:
        x: bfloat16 or float32, any number of rows.
        words, scales: W [k, n] from `layout_tpu.pack`.
        n: the columns of W.
        lora: factors, which are multiplied in x's dtype, and a scalar.
        chip, interpret: as for `dequantize`.

    Raises:
        ValueError: a case that `refuse` names, or arrays that do not fit each other.
    """
    return _run("nf4_matmul", x, words, scales, x.shape[1], n, lora, chip, interpret)


def matmul_t(
    dy: Float[Array, "m n"],
    words: Words,
    scales: Scales,
    *,
    k: int,
    lora: Lora | None = None,
    chip: str | None = None,
    interpret: Any = False,
) -> Float[Array, "m k"] | tuple[Float[Array, "m k"], Float32[Array, "m r"]]:
    """dy @ W^T in dy's dtype; with `lora = (a [k, r], b [r, n], scale)` also the low-rank term, and dy @ b^T.

    Arguments and errors are those of `matmul`; k is the rows of W.
    """
    return _run("nf4_matmul_t", dy, words, scales, k, dy.shape[1], lora, chip, interpret)


def _run(
    op: str, x: jax.Array, words: Any, scales: Any, k: int, n: int, lora: Lora | None, chip: str | None, interpret: Any
) -> Any:
    chip = chip_of() if chip is None else chip
    rank = 0 if lora is None else lora[0].shape[1]
    m = x.shape[0]
    _check(op, m, k, n, x.dtype, rank, chip, words, scales)
    transposed = op == "nf4_matmul_t"
    blocks = plan(transposed, m, k, n, x.dtype.itemsize, rank, chip)
    assert blocks is not None, "refuse names what has no plan"
    x = _pad(x, blocks.rows, blocks.contracted)
    factors = None if lora is None else _factors(lora, k, n, blocks, x.dtype)
    out = product(blocks, chip, x, words, scales, factors, k if transposed else n, interpret)
    out = [part[:m] for part in out]
    return out[0] if lora is None else tuple(out)


def _factors(lora: Lora, k: int, n: int, blocks: Plan, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    a, b, scale = lora
    rank = a.shape[1]
    if a.shape != (k, rank) or b.shape != (rank, n):
        raise ValueError(f"factors {a.shape} and {b.shape} do not fit W ({k}, {n}): a is (k, r) and b is (r, n)")
    rows, columns = (blocks.free, blocks.contracted) if blocks.transposed else (blocks.contracted, blocks.free)
    a, b = _pad(a.astype(dtype), rows, rank), _pad(b.astype(dtype), rank, columns)
    return a, b, jnp.asarray(scale, jnp.float32).reshape(1, 1)


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    if x.shape == (rows, columns):
        return x
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _check(
    op: str, m: int, k: int, n: int, dtype: Any, rank: int, chip: str, words: jax.Array, scales: jax.Array
) -> None:
    why = refuse(op, m, k, n, dtype, BLOCK, rank, chip)
    if why is not None:
        raise ValueError(f"{op}: {why}")
    kp, np_ = padded(k, n)
    if words.shape != (kp // 8, np_) or scales.shape != (kp // GROUP_ROWS, GROUP_ROWS // BLOCK, np_):
        raise ValueError(
            f"{op}: words {words.shape} and scales {scales.shape} are not those of W ({k}, {n}): use layout_tpu.pack"
        )
