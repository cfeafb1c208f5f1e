"""Writes nf4.npz: 4-bit arrays as bitsandbytes makes them on a CPU, and means as torch sums them with two threads.

pip install torch bitsandbytes
python tests/golden/make_nf4.py
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("nf4.npz")

# Odd sizes; blocks that are not full; more than 256 blocks, so that there are several groups of scales.
SHAPES = [(1,), (3,), (63,), (64,), (65,), (5, 13), (100, 70), (7, 128), (130, 256)]
DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = (32, 64, 128, 256)
SIZES = [*range(1, 41), 255, 1000, 5184, 32767, 32768, 40000, 262144]


def cases() -> list[tuple[tuple[int, ...], str, int, bool, str]]:
    """(shape, dtype, block size, double quantisation, format): most for small shapes, some for the two large ones."""
    small = [(shape, "float32", block, double, "nf4") for shape, block, double in _small(BLOCKS, (True, False))]
    small += [(shape, "bfloat16", block, True, "nf4") for shape, block in _small((64,))]
    small += [(shape, "float16", block, False, "fp4") for shape, block in _small((64, 32))]
    large = [
        (shape, dtype, block, True, format)
        for shape in SHAPES
        if np.prod(shape) >= 1000
        for dtype, block, format in (("float32", 64, "nf4"), ("bfloat16", 32, "nf4"), ("float16", 128, "fp4"))
    ]
    return small + large


def _small(*choices: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return list(itertools.product([shape for shape in SHAPES if np.prod(shape) < 1000], *choices))


def values(shape: tuple[int, ...]) -> np.ndarray:
    """Weights with a row of zeros, negative zeros, subnormal numbers, and values on the midpoints of the codebook."""
    x = np.random.default_rng(shape).normal(size=shape).astype(np.float32) * np.float32(0.05)
    flat = x.reshape(-1)
    if flat.size > 600:
        flat[64:192] = 0.0
        flat[200:210] = -0.0
        flat[256:320] = np.linspace(-1, 1, 64) * np.float32(1e-41)
        flat[320:384] = np.linspace(-1, 1, 64) * np.float32(3e-38)
        from lorax_kernels.nf4.codebooks import FP4, NF4

        middles = [np.sort(book)[:-1] / 2 + np.sort(book)[1:] / 2 for book in (NF4, FP4)]
        flat[384:448] = 1.0
        flat[385:400], flat[400:415] = middles[0], middles[1]
    return x


def numbers(size: int) -> np.ndarray:
    """What is averaged."""
    return np.random.default_rng(size).random(size, np.float32)


def main() -> None:
    import torch
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    torch.set_num_threads(2)
    out: dict[str, Any] = {}
    for number, (shape, dtype, block, double, format) in enumerate(cases()):
        x = torch.from_numpy(values(shape)).to(getattr(torch, dtype))
        codes, state = functional.quantize_4bit(x, blocksize=block, compress_statistics=double, quant_type=format)
        # By the implementation for all devices: that for AVX-512 (0.50.2) reads other scales where 16 divides the last
        # axis and the block does not.
        absmax = state.absmax
        if double:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        dense = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, block, state.shape, state.dtype)
        # XLA takes products below float32's least normal number for zero, and bitsandbytes' second zero of fp4 is -0
        # or +0, as the shape has it. Codes and scales of such blocks are compared as they are.
        dense[dense.double().abs() < float(np.finfo(np.float32).tiny)] = 0.0
        raw = dense.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        found = {"codes": codes.numpy().reshape(-1), "absmax": state.absmax.numpy()}
        if double:
            found |= {"absmax2": state.state2.absmax.numpy(), "offset": state.offset.numpy()}
        # The dequantised values of a large array follow from the rest: a sum of their bits is enough.
        found["bits"] = raw.reshape(-1) if raw.size < 1000 else np.asarray([raw.astype(np.int64).sum()])
        out |= {f"{number}/{name}": value for name, value in found.items()}
    out["means"] = np.asarray([torch.from_numpy(numbers(n)).mean().item() for n in SIZES], np.float32)
    torch.set_num_threads(1)
    out["sums_of_one_thread"] = np.asarray([torch.from_numpy(numbers(n)).sum().item() for n in SIZES], np.float32)
    np.savez_compressed(PATH, **out)


if __name__ == "__main__":
    main()
