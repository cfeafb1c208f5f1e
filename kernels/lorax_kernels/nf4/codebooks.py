"""The codebooks: sixteen values for 4 bits, the dynamic map for 8.

NF4 (Dettmers et al. 2023, "QLoRA"): quantiles of N(0, 1), eight positive, seven negative and an exact zero,
normalised to 1. FP4: one sign, two exponent and one mantissa bit, stored in the order of the bits. Dynamic map
(Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning"): decades from 1e-6 to 1, each next one with
twice as many linear steps.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float32

NF4: Float32[np.ndarray, "16"] = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)

_FP4_HALF = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)
# The second zero is a positive one too.
FP4: Float32[np.ndarray, "16"] = np.concatenate([_FP4_HALF, np.float32(0) - _FP4_HALF])

FOUR_BIT = {"nf4": NF4, "fp4": FP4}


@functools.cache
def dynamic_map(signed: bool = True) -> Float32[np.ndarray, "256"]:
    """The 256 values of the dynamic 8-bit type, ascending, from -0.993 (or 0) to 1.

    Decade i of seven holds 2^i (signed) or 2^(i+1) values: the middles of equal steps between 0.1 and 1, times
    10^(i-6). Zero and one are added.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(2 ** (i + (0 if signed else 1)) + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = [float(np.float32(10.0 ** (i - 6)) * m) for m in middles]
        values += decade
        if signed:
            values += [-v for v in decade]
    return np.array(sorted(values), np.float32)


def _linspace(count: int) -> Float32[np.ndarray, "count"]:
    """`count` points from 0.1 to 1 with a float32 step, each from the nearer end and rounded to float32 once."""
    start, stop = np.float32(0.1), np.float32(1.0)
    step = np.float64((stop - start) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, np.float64(start) + step * i, np.float64(stop) - step * (count - 1 - i)).astype(
        np.float32
    )
