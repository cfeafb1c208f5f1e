"""The rows of the table, in order of preference: which file implements what, and why it may not."""

from __future__ import annotations

import functools
import importlib

from lorax_kernels.dispatch import Backend, Shapes, register

DEQUANTISE, MATMUL, MATMUL_T = "nf4_dequantise", "nf4_matmul", "nf4_matmul_t"


def _never(op: str, shapes: Shapes, chip: str) -> str | None:
    return None


def _loads() -> str | None:
    return None


def _pallas(op: str, s: Shapes, chip: str) -> str | None:
    from lorax_kernels.nf4_matmul import pallas_tpu

    return pallas_tpu.refuse(op, s.m, s.k, s.n, s.dtype, s.block_size, s.rank, chip)


def _triton(op: str, s: Shapes, chip: str) -> str | None:
    from lorax_kernels.nf4_matmul import triton_gpu

    return triton_gpu.refuse(op, s.m, s.k, s.n, s.dtype, s.block_size, s.rank, chip)


@functools.cache
def _triton_broken() -> str | None:
    """Why jax-triton cannot be used here; None if it can."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install fails in its own ways; the reason is shown, not swallowed
            return f"{name} does not import ({type(error).__name__}: {error}); pip install 'lorax-flax[cuda]'"
    return None


register(Backend("pallas", ("tpu",), (DEQUANTISE, MATMUL, MATMUL_T), _pallas, _loads))
register(Backend("triton", ("cuda",), (DEQUANTISE, MATMUL, MATMUL_T), _triton, _triton_broken))
# Last: it serves everything. On a CPU it is the implementation, elsewhere what is left.
register(Backend("xla", (), (DEQUANTISE, MATMUL, MATMUL_T), _never, _loads))
