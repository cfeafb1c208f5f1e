"""The rows of the table, in order of preference: which file implements what, and why it may not."""

from __future__ import annotations

import functools
import importlib

from lorax_kernels.dispatch import Backend, Shapes, register

DEQUANTISE, MATMUL, MATMUL_T = "nf4_dequantise", "nf4_matmul", "nf4_matmul_t"
MULTI, MULTI_GRAD = "multi_lora", "multi_lora_grad"

# Bounds of the plain JAX rows of `multi_lora`: reasoned from operations and bytes moved, to be replaced by measurements
# (`multi_lora/cases.py` has the shapes).
ONEHOT_TOTAL, SORTED_ROWS, SORTED_GROUPS = 64, 8, 64


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


def _multi_onehot(op: str, s: Shapes, chip: str) -> str | None:
    # Measured on a CPU: every row meets every rank, so the ranks must be few.
    if s.total > ONEHOT_TOTAL:
        return f"computes all {s.total} ranks for every row; faster up to {ONEHOT_TOTAL}"
    return None


def _multi_sorted(op: str, s: Shapes, chip: str) -> str | None:
    if s.m // s.groups >= SORTED_ROWS:
        return f"sorts rows, and groups of {s.m // s.groups} rows are tiles as they are"
    if s.groups < SORTED_GROUPS:
        return f"sorts rows into tiles, and {s.groups} groups are too few to fill them"
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


register(Backend("pallas", ("tpu",), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _pallas, _loads))
register(Backend("triton", ("cuda",), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _triton, _triton_broken))
# The last serves everything. On a CPU it is the implementation, elsewhere what is left.
register(Backend("xla_onehot", (), (MULTI, MULTI_GRAD), _never, _loads, _multi_onehot))
register(Backend("xla_sorted", (), (MULTI, MULTI_GRAD), _never, _loads, _multi_sorted))
register(Backend("xla", (), (DEQUANTISE, MATMUL, MATMUL_T, MULTI, MULTI_GRAD), _never, _loads))
