"""Running the Triton kernels with Triton's interpreter: on a CPU, on torch tensors, one program after the other."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax.numpy as jnp
import numpy as np
import torch

from lorax_kernels import nf4
from lorax_kernels.nf4_matmul import triton_gpu, triton_kernels
from lorax_kernels.nf4_matmul.triton_plan import plan

LAUNCH = ("num_warps", "num_stages")


def weight(rng: np.random.Generator, k: int, n: int, block: int, double: bool = True):
    """A weight's codes and scales as torch tensors, and W (k, n) in float64."""
    q = nf4.quantize(jnp.asarray(rng.normal(size=(n, k)), jnp.float32), block, double)
    scales = np.array(nf4.resolve_scales(q)).reshape(n, k // block)
    dense = np.asarray(nf4.dequantize(q), np.float64).T
    return torch.from_numpy(np.array(q.codes)), torch.from_numpy(scales), dense


def product(x, codes, scales, lora=None, transposed=False, block=64):
    """What `triton_gpu` computes, with its tiles: (y, h) as numpy arrays, h None without a low-rank term."""
    m, n, k = x.shape[0], codes.shape[0], 2 * codes.shape[1]
    rank = 0 if lora is None else lora[0].shape[1]
    tiles = plan(transposed, m, k, n, x.element_size(), rank)
    if lora is None:
        a, b, scale = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)
    else:
        spare = tiles.rank - rank
        a = torch.nn.functional.pad(lora[0], (0, spare)).contiguous()
        b = torch.nn.functional.pad(lora[1], (0, 0, 0, spare)).contiguous()
        scale = torch.tensor([lora[2]], dtype=torch.float32)
    partial = tiles.split > 1
    y = torch.full((tiles.split, m, tiles.free), torch.nan, dtype=torch.float32 if partial else x.dtype)
    h = torch.full((tiles.split, m, max(tiles.rank, 1)), torch.nan)
    kernel = triton_kernels.product_t if transposed else triton_kernels.product
    constants = {k: v for k, v in triton_gpu.constants(tiles, m, k, n, block).items() if k not in LAUNCH}
    kernel[tiles.grid](x, codes, scales, a, b, scale, y, h, **constants)
    y, h = y.sum(0).double().numpy(), h.sum(0).double().numpy()
    if lora is None:
        return y, None
    if partial:
        second = (a.T if transposed else b).double().numpy()
        y = y + (h * lora[2]) @ second
    return y, h[:, :rank]
