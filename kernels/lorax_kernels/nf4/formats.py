"""One table of formats, so that a study can compare them: nf4, fp4, int8, bf16.

nf4   16 quantiles of N(0, 1), a scale for each block         4.127 bits with double quantisation, 4.5 without
fp4   16 floats of 1 + 2 + 1 bits, a scale for each block     the same
int8  round(127 x / absmax), a scale for each row             8 bits
bf16  rounded, no scale                                       16 bits
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorax_kernels.nf4.codebooks import FP4, NF4

BLOCK_SIZES = (32, 64, 128, 256)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Format:
    """A row of the table: its codebook (None where the code is a number), and whether its scales belong to blocks."""

    name: str
    codebook: np.ndarray | None
    blocks: bool


FORMATS = {
    "nf4": Format("nf4", NF4, True),
    "fp4": Format("fp4", FP4, True),
    "int8": Format("int8", None, False),
    "bf16": Format("bf16", None, False),
}


def check(format: str, block_size: int, dtype: str, shape: tuple[int, ...], stack: int) -> None:
    """Refuse what cannot be quantised.

    Raises:
        ValueError: names the argument and what is allowed.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size!r} is not served; choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if dtype not in DTYPES:
        raise ValueError(f"an array of {dtype} cannot be quantised; cast it to one of {', '.join(DTYPES)}")
    if 0 in shape:
        raise ValueError(f"an array of shape {shape} holds nothing to quantise")
    if not 0 <= stack < max(len(shape), 1):
        raise ValueError(f"stack={stack} leaves nothing of an array of shape {shape}; stack counts its leading axes")
