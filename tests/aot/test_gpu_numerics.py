"""Triton kernels against float64, with fresh random inputs: forward, backward, low-rank term, dequantise, decode."""

import numpy as np
import pytest
import torch
from gpu_support import product, weight

from lorax_kernels.nf4_matmul import triton_gpu, triton_kernels
from lorax_kernels.nf4_matmul.triton_plan import plan

pytestmark = pytest.mark.aot

RNG = np.random.default_rng()
# Rows, K, N, block: decode with and without parts of K, odd sizes, several tiles, every block size.
SHAPES = [
    (1, 64, 1, 64),
    (5, 192, 70, 64),
    (2, 1024, 70, 64),
    (1, 64, 1100, 64),
    (16, 1024, 96, 64),
    (33, 320, 130, 64),
    (130, 192, 129, 32),
    (40, 256, 128, 128),
    (35, 512, 70, 256),
]


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("m", "k", "n", "block"), SHAPES)
def test_float32_products_with_and_without_the_low_rank_term(m, k, n, block, transposed):
    codes, scales, dense = weight(RNG, k, n, block)
    x = RNG.normal(size=(m, n if transposed else k)).astype(np.float32)
    a, b = RNG.normal(size=(k, 3)).astype(np.float32), RNG.normal(size=(3, n)).astype(np.float32)
    whole = dense.T if transposed else dense
    y, _ = product(torch.from_numpy(x), codes, scales, None, transposed, block)
    assert error(y, x.astype(np.float64) @ whole) < 1e-5
    y, h = product(
        torch.from_numpy(x), codes, scales, (torch.from_numpy(a), torch.from_numpy(b), 0.7), transposed, block
    )
    first, second = (b.T, a.T) if transposed else (a, b)
    low = x.astype(np.float64) @ first.astype(np.float64)
    assert error(h, low) < 1e-5
    assert error(y, x.astype(np.float64) @ whole + 0.7 * low @ second) < 1e-5


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", [5, 70])
def test_float16_outputs_round_once(m, transposed):
    """The interpreter has no bfloat16 products; float16 takes the same tiles and the same kernel."""
    codes, scales, dense = weight(RNG, 192, 70, 64)
    x = RNG.normal(size=(m, 70 if transposed else 192)).astype(np.float16)
    y, _ = product(torch.from_numpy(x), codes, scales, None, transposed)
    assert error(y, x.astype(np.float64) @ (dense.T if transposed else dense)) < 4e-3


@pytest.mark.parametrize("block", triton_gpu.BLOCK_SIZES)
@pytest.mark.parametrize("double", [True, False])
def test_dequantise_is_exact_to_the_bit(block, double):
    k, n = 2 * 256, 37
    codes, scales, dense = weight(RNG, k, n, block, double)
    out = torch.full((n, k), torch.nan)
    triton_kernels.dequantise[(-(-n // 32), -(-k // 128))](codes, scales, out, N=n, K=k, BS=block, BN=32, BK=128)
    np.testing.assert_array_equal(out.numpy(), dense.T.astype(np.float32))


def test_the_shapes_reach_both_ways_of_decoding():
    for transposed in (False, True):
        splits = {plan(transposed, m, k, n, 4, 3).split for m, k, n, _ in SHAPES if m <= 32}
        assert 1 in splits
        assert max(splits) > 1
