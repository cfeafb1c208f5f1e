"""Blockwise 8 bit: against bitsandbytes' golden codes, against brute force, and what must hold for any array."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax.errors import LoraxError
from lorax.optim.blockwise import (
    Blockwise,
    _cells,
    dequantize_blockwise,
    nearest8,
    quantize_blockwise,
    zeros_blockwise,
)
from lorax_kernels.nf4.codebooks import dynamic_map

pytestmark = pytest.mark.optimised

_spec = importlib.util.spec_from_file_location(
    "make_adam8bit", Path(__file__).parents[1] / "golden" / "make_adam8bit.py"
)
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

ROUNDINGS = ["nearest", "table"]
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def drawn(shape, signed=True, seed=None):
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * 10.0 ** random.uniform(-6, 0, shape)
    return jnp.asarray(x if signed else np.abs(x), jnp.float32)


def rank(x, signed):
    """The nearest code by its definition: the midpoints below x, of which there are none at x itself."""
    values = dynamic_map(signed)
    return np.searchsorted((values[:-1] + values[1:]) / np.float32(2), x, side="left")


@pytest.mark.parametrize("name", make.CASES)
def test_table_rounding_is_bitsandbytes_on_a_cpu(name):
    shape, block, signed = make.CASES[name]
    x = make.values(name)
    q = quantize_blockwise(jnp.asarray(x), block, signed, "table")
    with np.load(make.PATH) as golden:
        np.testing.assert_array_equal(q.codes, golden[f"{name}/codes"])
        np.testing.assert_array_equal(np.ravel(q.absmax), golden[f"{name}/absmax"])
    assert q.codes.shape == shape


@SIGNED
def test_nearest_around_every_midpoint_and_entry(signed):
    values = dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    points = np.concatenate([values, middles, [0.0, -0.0, 1.0, -1.0]]).astype(np.float32)
    around = [points, np.nextafter(points, np.float32(-2)), np.nextafter(points, np.float32(2))]
    x = np.clip(np.concatenate(around), -1, 1)
    np.testing.assert_array_equal(nearest8(jnp.asarray(x), signed), rank(x, signed))


@SIGNED
def test_nearest_is_nearest(signed):
    """Brute force in float64 over all 256 entries, on values of every magnitude."""
    random = np.random.default_rng()
    x = (10.0 ** random.uniform(-9, 0, 4001) * random.choice([-1.0, 1.0], 4001)).astype(np.float32)
    gaps = np.abs(x[:, None].astype(np.float64) - dynamic_map(signed).astype(np.float64))
    got = gaps[np.arange(x.size), np.asarray(nearest8(jnp.asarray(x), signed))]
    # Midpoints are float32, too: beside them either entry is as near.
    assert (got <= gaps.min(1) + 2e-7 * np.abs(x)).all()


@SIGNED
def test_no_cell_has_two_midpoints(signed):
    """What the two lookups of `nearest8` rest on, for every upper half of a float in [-1, 1]."""
    below, middles = _cells(signed)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.stack([bits.view(np.float32), (bits | 0xFFFF).view(np.float32)])
    inside = np.abs(ends[0]) <= 1  # no NaN passes
    above = np.searchsorted(middles, ends.max(0)[inside], side="left")
    assert np.count_nonzero(inside) > 30_000
    assert set(np.unique(above - below[inside])) == {0, 1}


@SIGNED
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (259,), (4, 512), (0,), (3, 0), (0, 256)])
def test_round_trip_within_half_a_gap(shape, signed):
    x = drawn(shape, signed)
    q = quantize_blockwise(x, 256, signed)
    back = dequantize_blockwise(q, 256, signed)
    assert (back.shape, back.dtype, q.codes.shape, q.codes.dtype) == (shape, jnp.float32, shape, jnp.uint8)
    assert q.absmax.size == -(-x.size // 256)
    if x.size:
        # The first and last gaps are to -1, which the signed map lacks.
        widest = max(float(np.diff(dynamic_map(signed)).max()) / 2, 1 - 0.9929 if signed else 0)
        assert float(jnp.abs(back - x).max()) <= widest * float(jnp.abs(x).max()) * (1 + 1e-6)


@SIGNED
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-44, 1e-39])
def test_blocks_of_nothing_stay_nothing(value, signed):
    x = jnp.full((300,), value, jnp.float32)
    q = quantize_blockwise(x, 256, signed)
    assert float(jnp.abs(dequantize_blockwise(q, 256, signed)).max()) <= 1e-38
    if not value:
        np.testing.assert_array_equal(q.codes, zeros_blockwise(x, 256, signed).codes)
    assert not dequantize_blockwise(zeros_blockwise(x, 256, signed)).any()


def test_zero_beside_large_values_stays_zero():
    x = drawn((700,)).at[::3].set(0.0)
    for signed in (True, False):
        back = dequantize_blockwise(quantize_blockwise(jnp.abs(x), 256, signed), 256, signed)
        assert not back[::3].any()
    # The other rounding is the one that bitsandbytes has on a CPU, drift and all.
    back = dequantize_blockwise(quantize_blockwise(x, 256, True, "table"))
    assert back[::3].all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_blocks_run_along_the_flattened_array(rounding):
    x = drawn((6, 512))
    whole, flat = quantize_blockwise(x, 128, True, rounding), quantize_blockwise(x.reshape(-1), 128, True, rounding)
    assert whole.absmax.shape == (6, 4)
    np.testing.assert_array_equal(whole.codes.reshape(-1), flat.codes)
    np.testing.assert_array_equal(whole.absmax.reshape(-1), flat.absmax)
    np.testing.assert_array_equal(whole.absmax, jnp.abs(x).reshape(6, 4, 128).max(-1))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_jit_vmap_and_dtype_change_nothing(rounding):
    x = drawn((3, 5, 67)).astype(jnp.bfloat16)
    one = lambda x: quantize_blockwise(x, 64, True, rounding)  # noqa: E731
    want = [one(part.astype(jnp.float32)) for part in x]
    for got in (jax.vmap(one)(x), jax.jit(jax.vmap(one))(x)):
        np.testing.assert_array_equal(got.codes, jnp.stack([q.codes for q in want]))
        np.testing.assert_array_equal(got.absmax, jnp.stack([q.absmax for q in want]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_no_table_of_all_distances(rounding):
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    compiled = jax.jit(lambda x: quantize_blockwise(x, 256, True, rounding)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * x.size * 4


def test_a_sharded_array_is_not_gathered():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = drawn((8, 1024))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    run = jax.jit(lambda x: dequantize_blockwise(quantize_blockwise(x)))
    text = run.lower(sharded).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    np.testing.assert_array_equal(run(sharded), run(x))


def test_zeros_are_sharded_as_their_array():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(drawn((8, 256)), NamedSharding(mesh, PartitionSpec("a")))
    assert zeros_blockwise(x, 256, True).codes.sharding == x.sharding


@pytest.mark.parametrize(("arguments", "word"), [((0,), "block_size 0"), ((64, True, "up"), "'up'")])
def test_mistakes_are_named(arguments, word):
    with pytest.raises(LoraxError, match=word):
        quantize_blockwise(jnp.ones(3), *arguments)


def test_it_is_a_plain_tree():
    q = quantize_blockwise(drawn((300,)))
    assert isinstance(jax.tree.map(lambda x: x, q), Blockwise)
    assert len(jax.tree.leaves(q)) == 2
