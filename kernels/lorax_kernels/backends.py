"""The rows of the table, in order of preference: which file implements what, and why it may not."""

from __future__ import annotations

from lorax_kernels.dispatch import Backend, Shapes, register

DEQUANTISE, MATMUL, MATMUL_T = "nf4_dequantise", "nf4_matmul", "nf4_matmul_t"


def _never(op: str, shapes: Shapes, chip: str) -> str | None:
    return None


def _loads() -> str | None:
    return None


def _pallas(op: str, s: Shapes, chip: str) -> str | None:
    from lorax_kernels.nf4_matmul import pallas_tpu

    return pallas_tpu.refuse(op, s.m, s.k, s.n, s.dtype, s.block_size, s.rank, chip)


register(Backend("pallas", ("tpu",), (DEQUANTISE, MATMUL, MATMUL_T), _pallas, _loads))
# Last: it serves everything. On a CPU it is the implementation, elsewhere what is left.
register(Backend("xla", (), (DEQUANTISE, MATMUL, MATMUL_T), _never, _loads))
