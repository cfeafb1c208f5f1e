"""Pallas kernels in TPU interpret mode, with race detection, against float64 and fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels import nf4
from lorax_kernels.nf4_matmul import layout_tpu, pallas_tpu

pytestmark = pytest.mark.aot

RNG = np.random.default_rng()
CHIPS = ("v5e", "v6e")
# Rows, K, N: fewer than a tile, odd, several blocks of K and N, more rows than a block of them.
SHAPES = [(5, 192, 70), (1, 64, 1), (33, 576, 200), (300, 1088, 384), (20, 512, 1024)]


def weight(k, n):
    q = nf4.quantize(jnp.asarray(RNG.normal(size=(n, k)), jnp.float32))
    words, scales = layout_tpu.pack(q.codes, nf4.resolve_scales(q).reshape(n, k // 64))
    return words, scales, np.asarray(nf4.dequantize(q), np.float64).T


def watching():
    return pltpu.InterpretParams(detect_races=True)


def raced():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    return interpreter.races.races_found


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_products_with_and_without_the_low_rank_term(m, k, n, transposed, chip):
    words, scales, dense = weight(k, n)
    x = RNG.normal(size=(m, n if transposed else k)).astype(np.float32)
    a, b = RNG.normal(size=(k, 3)).astype(np.float32), RNG.normal(size=(3, n)).astype(np.float32)
    whole, first, second = (dense.T, b.T, a.T) if transposed else (dense, a, b)
    run = pallas_tpu.matmul_t if transposed else pallas_tpu.matmul
    more = {"k": k} if transposed else {"n": n}
    exact = x.astype(np.float64)
    low = exact @ first.astype(np.float64)
    y = run(jnp.asarray(x), words, scales, **more, chip=chip, interpret=watching())
    assert error(y, exact @ whole) < 1e-5
    assert not raced()
    lora = (jnp.asarray(a), jnp.asarray(b), 0.7)
    y, h = run(jnp.asarray(x), words, scales, **more, lora=lora, chip=chip, interpret=watching())
    assert error(h, low) < 1e-5
    assert error(y, exact @ whole + 0.7 * low @ second) < 1e-5
    assert not raced()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
def test_bfloat16_outputs_round_once(transposed, chip):
    """Against the bf16 weight that the kernel multiplies, in float64: what is left is the rounding of y."""
    m, k, n = 19, 320, 130
    words, scales, dense = weight(k, n)
    half = np.asarray(jnp.asarray(dense, jnp.float32).astype(jnp.bfloat16), np.float64)
    x = jnp.asarray(RNG.normal(size=(m, n if transposed else k))).astype(jnp.bfloat16)
    run = pallas_tpu.matmul_t if transposed else pallas_tpu.matmul
    y = run(x, words, scales, **({"k": k} if transposed else {"n": n}), chip=chip, interpret=watching())
    assert y.dtype == jnp.bfloat16
    assert error(y, np.asarray(x, np.float64) @ (half.T if transposed else half)) < 4e-3
    assert not raced()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantise_is_exact_to_the_bit(dtype, chip):
    words, scales, dense = weight(576, 130)
    got = pallas_tpu.dequantize(words, scales, 576, 130, dtype, chip=chip, interpret=watching())
    np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(dense, jnp.float32).astype(dtype)))
    assert not raced()


def test_the_order_of_the_codes_loses_nothing():
    q = nf4.quantize(jnp.asarray(RNG.normal(size=(70, 576)), jnp.float32), double_quant=False)
    words, scales = layout_tpu.pack(q.codes, q.scales)
    codes, back = layout_tpu.unpack(words, scales, 576, 70)
    np.testing.assert_array_equal(codes, q.codes)
    np.testing.assert_array_equal(back, q.scales)
    assert jax.tree.leaves(q)
