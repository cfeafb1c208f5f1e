"""The rows of the table, in order of preference: which file implements what, and why it may not."""

from __future__ import annotations

import functools
import importlib

from lorax_kernels.dispatch import Backend, Shapes, register

DEQUANTISE, MATMUL, MATMUL_T = "nf4_dequantise", "nf4_matmul", "nf4_matmul_t"
MULTI, MULTI_GRAD = "multi_lora", "multi_lora_grad"

# Bounds of the plain JAX rows of `multi_lora`, measured on a CPU (`measure_multi`, results/multi_lora_cpu.json: width
# 576, float32). Two products over all ranks win while these cost less than the turns of a loop: up to 64 ranks where a
# group is a row or a few, 32 for some more rows. Turns of 64 rows run at full speed, and the loop wins or is even.
ONEHOT_TOTAL = {8: 64, 64: 32}
# Sorting pays from 512 rows on where groups are shorter than 8 rows (256 groups of 2: 0.91 of the loop's time, 256 of
# 1: 1.15); from 8 rows on, groups are tiles as they are (256 of 8: 1.23).
SORTED_ROWS, SORTED_LEAST = 8, 512

# On TPUs and GPUs nobody has timed the choice, so it is by arithmetic. Up to a matrix unit's width, all ranks of a bank
# cost what those of one adapter cost.
ONE_WINDOW = 128
# Operations (bf16) that a chip can do while it moves a byte, of its published peaks: 197 T/819 G, 459/2765, 918/1640,
# 2307/7380. Copying x and the result in another order moves 4 (k + n) bytes a row more, and a rank more a row is
# 2 (k + n) operations: they are even at twice as many ranks as this.
FLOPS_A_BYTE = {"v5e": 240, "v5p": 166, "v6e": 560, "tpu7x": 312}
# XLA keeps an array on a TPU transposed if it takes less room so, as (total, k) does where k is not whole lanes of 128.
# A kernel takes it as it is written, so the whole factor is copied before it: no more than what the one-hot products do
# when they round it, but a large bank is not to be copied for a few of its adapters.
MOST_COPIED = 1024


def _never(op: str, shapes: Shapes, chip: str) -> str | None:
    return None


def _loads() -> str | None:
    return None


def _pallas(op: str, s: Shapes, chip: str) -> str | None:
    if op in (MULTI, MULTI_GRAD):
        from lorax_kernels.multi_lora import pallas_tpu as multi

        return _split(s) or multi.refuse(op, s.m, s.k, s.n, s.dtype, s.rank, s.groups, s.total, chip)
    from lorax_kernels.nf4_matmul import pallas_tpu

    return pallas_tpu.refuse(op, s.m, s.k, s.n, s.dtype, s.block_size, s.rank, chip)


def _triton(op: str, s: Shapes, chip: str) -> str | None:
    if op in (MULTI, MULTI_GRAD):
        from lorax_kernels.multi_lora import triton_gpu as multi

        return _split(s) or multi.refuse(op, s.m, s.k, s.n, s.dtype, s.rank, s.groups, chip)
    from lorax_kernels.nf4_matmul import triton_gpu

    return triton_gpu.refuse(op, s.m, s.k, s.n, s.dtype, s.block_size, s.rank, chip)


def _split(s: Shapes) -> str | None:
    if s.split:
        return "the compiler splits this program over devices, and takes no kernel apart; under shard_map it serves"
    return None


def _multi_kernel(op: str, s: Shapes, chip: str) -> str | None:
    """Where two plain products over all ranks are the better choice than a kernel for TPUs or GPUs."""
    if op not in (MULTI, MULTI_GRAD):
        return None
    if s.total <= ONE_WINDOW:
        return f"all {s.total} ranks fill one weight of the matrix unit: two plain products do the same work"
    if chip in FLOPS_A_BYTE and (s.k % 128 or s.n % 128) and s.total > MOST_COPIED:
        return f"k = {s.k}, n = {s.n} are not whole lanes: XLA would copy all {s.total} ranks into another layout"
    if _sorts(s) and chip in FLOPS_A_BYTE and s.total <= 2 * FLOPS_A_BYTE[chip]:
        even = 2 * FLOPS_A_BYTE[chip]
        return f"would copy rows in order of their adapter; {even} ranks for every row cost no more, by published peaks"
    return None


def _sorts(s: Shapes) -> bool:
    """Whether the TPU's kernel would put rows in order: groups that are no tiles, in more than one tile."""
    return s.m // s.groups < 16 and s.m > 256


def _multi_onehot(op: str, s: Shapes, chip: str) -> str | None:
    # Every row meets every rank, so the ranks must be few.
    bound = next((total for rows, total in ONEHOT_TOTAL.items() if s.m // s.groups < rows), 0)
    if chip:
        bound = 2 * FLOPS_A_BYTE[chip] if _sorts(s) and chip in FLOPS_A_BYTE else ONE_WINDOW
    if s.total > bound:
        return f"computes all {s.total} ranks for every row; faster up to {bound}"
    return None


def _multi_sorted(op: str, s: Shapes, chip: str) -> str | None:
    if s.m // s.groups >= SORTED_ROWS:
        return f"sorts rows, and groups of {s.m // s.groups} rows are tiles as they are"
    if s.m < SORTED_LEAST:
        return f"sorts rows into tiles, and {s.m} rows are too few to fill them"
    return None


@functools.cache
def _triton_broken() -> str | None:
    """Why jax-triton cannot be used here; None if it can."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install fails in its own ways; the reason is shown, not swallowed
            return f"{name} does not import ({type(error).__name__}: {error}); pip install 'lorax-flax[cuda]'"
    return None


register(Backend("pallas", ("tpu",), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _pallas, _loads, _multi_kernel))
register(
    Backend(
        "triton", ("cuda",), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _triton, _triton_broken, _multi_kernel
    )
)
# The last serves everything. On a CPU it is the implementation, elsewhere what is left.
register(Backend("xla_onehot", (), (MULTI, MULTI_GRAD), _never, _loads, _multi_onehot))
register(Backend("xla_sorted", (), (MULTI, MULTI_GRAD), _never, _loads, _multi_sorted))
register(Backend("xla", (), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _never, _loads))
