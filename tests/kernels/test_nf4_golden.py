"""The format, bit for bit: codes, scales, scales of scales, offsets and values as bitsandbytes wrote them down."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import nf4
from lorax_kernels.nf4.mean import mean, total

pytestmark = pytest.mark.optimised

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_nf4", GOLDEN / "make_nf4.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
RECORDED = dict(np.load(GOLDEN / "nf4.npz"))
CASES = make.cases()


def equal(ours, theirs, what):
    np.testing.assert_array_equal(np.asarray(ours).reshape(-1), theirs, err_msg=what)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def both(x, block, double, format):
    """In one program, as a user's own step would have it; each alone is compared in the next test."""
    q = nf4.quantize(x, block, double, format)
    return q, nf4.dequantize(q)


@pytest.mark.parametrize("shape", make.SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_bit_is_that_of_bitsandbytes(shape):
    mine = [(number, case) for number, case in enumerate(CASES) if case[0] == shape]
    assert mine
    for number, (_, dtype, block, double, format) in mine:
        what = f"{shape} {dtype} {block} {double} {format}"
        q, dense = both(jnp.asarray(make.values(shape)).astype(dtype), block, double, format)
        equal(q.codes, RECORDED[f"{number}/codes"], what)
        equal(q.scales, RECORDED[f"{number}/absmax"], what)
        if double:
            equal(q.scales2, RECORDED[f"{number}/absmax2"], what)
            equal(q.offset, RECORDED[f"{number}/offset"], what)
        else:
            assert q.scales2 is None
        assert dense.dtype == dtype
        assert dense.shape == shape
        dense = np.asarray(dense)
        dense = np.where(np.abs(dense.astype(np.float64)) < np.finfo(np.float32).tiny, np.zeros_like(dense), dense)
        bits = dense.view(np.int32 if dtype == "float32" else np.int16).reshape(-1)
        equal(bits if bits.size < 1000 else bits.astype(np.int64).sum(), RECORDED[f"{number}/bits"], what)


@pytest.mark.parametrize("shape", [(65,), (130, 256)], ids=str)
def test_alone_each_half_gives_the_same_bits(shape):
    x = jnp.asarray(make.values(shape))
    q = nf4.quantize(x)
    together, dense = both(x, 64, True, "nf4")
    for a, b in zip(jax.tree.leaves((q, nf4.dequantize(q))), jax.tree.leaves((together, dense)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_golden_inputs_are_awkward():
    x = make.values((130, 256)).reshape(-1)
    assert (x == 0).sum() > 100
    assert np.signbit(x[x == 0]).any()
    assert ((x != 0) & (np.abs(x) < np.finfo(np.float32).tiny)).any()
    assert len(x) // 64 > 256, "several groups of scales"


@pytest.mark.parametrize("place", range(0, len(make.SIZES), 8))
def test_means_are_summed_in_the_order_of_torch(place):
    some = slice(place, place + 8)
    arrays = [jnp.asarray(make.numbers(size)) for size in make.SIZES[some]]
    means, totals = jax.jit(lambda arrays: (list(map(mean, arrays)), list(map(total, arrays))))(arrays)
    assert np.stack(means).tolist() == RECORDED["means"][some].tolist(), make.SIZES[some]
    assert np.stack(totals).tolist() == RECORDED["sums_of_one_thread"][some].tolist(), make.SIZES[some]


@pytest.mark.parametrize("count", [5, 100, 5184])
def test_a_mapped_mean_rounds_like_one_alone(count):
    """A division by one count for a whole batch must not become a product with the count's inverse."""
    x = jnp.asarray(np.random.default_rng(count).random((31, count), np.float32))
    alone = [float(jax.jit(mean)(row)) for row in x]
    assert np.asarray(jax.jit(jax.vmap(mean))(x)).tolist() == alone


def test_a_block_that_is_not_full_is_divided_and_not_multiplied_by_an_inverse():
    """-7 / 24 lies above a midpoint of FP4 by one bit, and -7 * (1 / 24) on it."""
    x = jnp.full((1, 120), -7.0).at[0, 0].set(24.0)
    codes = np.asarray(nf4.quantize(x, 256, False, "fp4").codes).reshape(-1)
    assert (codes[0], *set(codes[1:].tolist())) == (0x3F, 0xFF)
