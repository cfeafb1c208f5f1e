"""What holds for any array: error bounds, round trips, slices, and refusals. Values and layouts are drawn afresh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import lorax
from lorax_kernels import nf4
from lorax_kernels.nf4.bitsandbytes import to_checkpoint
from lorax_kernels.nf4.codebooks import FOUR_BIT, dynamic_map

# A compiler's work each, so few of them: one number, less than a block, odd, whole blocks, several groups of scales.
SHAPES = [(1,), (5, 13), (3, 7, 11), (6, 256), (700, 33)]
EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}

layouts = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "dtype": st.sampled_from(sorted(EPS)),
        "format": st.sampled_from(sorted(nf4.FORMATS)),
        "block_size": st.sampled_from((32, 64, 128, 256)),
        "double_quant": st.booleans(),
    }
)


@st.composite
def weights(draw):
    """A layout, and values with zeros of both signs, repeats, and blocks of very different size."""
    layout = draw(layouts)
    shape = layout["shape"]
    few = draw(arrays.arrays(np.float32, (7,), elements=st.floats(-4, 4, width=32)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=shape) * 10.0 ** draw(st.integers(-3, 3))
    x = np.where(rng.random(shape) < 0.2, rng.choice(few, shape), x)
    x = np.where(rng.random((*shape[:-1], 1)) < 0.2, -0.0, x)
    return layout, jnp.asarray(x, jnp.float32).astype(layout["dtype"])


def made(layout, x, stack=0):
    return nf4.quantize(x, layout["block_size"], layout["double_quant"], layout["format"], stack)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def blocks(x, size):
    flat = np.asarray(x, np.float64).reshape(-1)
    return np.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def bound(layout, x):
    """How far each value may lie from its code's, by the format alone, in float64."""
    format, eps = layout["format"], EPS[layout["dtype"]]
    flat = np.abs(np.asarray(x, np.float64).reshape(-1))
    if format == "bf16":
        return flat * EPS["bfloat16"]
    if format == "int8":
        rows = np.abs(np.asarray(x, np.float64)).reshape(-1, x.shape[-1]).max(1, keepdims=True)
        return np.broadcast_to(rows * (0.5 / 127 + 1e-6 + eps), (rows.size, x.shape[-1])).reshape(-1)
    scales = np.abs(blocks(x, layout["block_size"])).max(1)
    gap = np.diff(np.sort(FOUR_BIT[format]).astype(np.float64)).max() / 2
    moved = 0.0
    if layout["double_quant"]:
        # The scale itself is off by half a gap of the 8-bit map, and by the 16 bits that it is rounded to before.
        group = np.abs(blocks(scales - scales.mean(), 256)).max(1)
        map_gap = np.diff(dynamic_map().astype(np.float64)).max() / 2 + 2.0 / 65535
        moved = np.repeat(group, 256)[: scales.size] * map_gap
    each = scales * (gap + 1e-6) + moved + (scales + moved) * eps
    return np.repeat(each, layout["block_size"])[: flat.size]


@settings(max_examples=15, deadline=None)
@given(weights())
def test_no_value_is_further_off_than_its_format_says(drawn):
    layout, x = drawn
    dense = nf4.dequantize(made(layout, x))
    assert (dense.shape, dense.dtype) == (x.shape, x.dtype)
    off = np.abs(np.asarray(dense, np.float64) - np.asarray(x, np.float64)).reshape(-1)
    assert (off <= bound(layout, x) + 1e-37).all()


@settings(max_examples=8, deadline=None)
@given(weights())
def test_arrays_travel_to_bitsandbytes_and_back_unchanged(drawn):
    layout, x = drawn
    q = made(layout, x)
    if layout["format"] in FOUR_BIT:
        same(nf4.from_bitsandbytes(nf4.to_bitsandbytes(q)), q)
        file = {name or "weight": value for name, value in to_checkpoint(q).items()}
        same(nf4.from_bitsandbytes(file), q)
    else:
        with pytest.raises(ValueError, match=f"no 4-bit arrays of format '{layout['format']}'"):
            nf4.to_bitsandbytes(q)


@settings(max_examples=6, deadline=None)
@given(weights())
def test_a_stack_is_its_slices(drawn):
    layout, x = drawn
    x = jnp.stack([x, -2 * x, jnp.zeros_like(x)])
    together = made(layout, x, stack=1)
    assert together.shape == x.shape
    for i in range(3):
        same(jax.tree.map(lambda leaf, i=i: leaf[i], together), made(layout, x[i]))
    same(made(layout, x, stack=1), together)


@settings(max_examples=5, deadline=None)
@given(weights(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_what_has_no_code_is_refused_with_its_path(drawn, bad, data):
    layout, x = drawn
    x = x.at[tuple(data.draw(st.integers(0, n - 1)) for n in x.shape)].set(bad)
    tree = {"block": {"kernel": x}, "other": jnp.ones((2, 2))}
    how = {name: layout[name] for name in ("format", "block_size", "double_quant")}
    with pytest.raises(lorax.LoraxError, match=r"block/kernel: .*NaN or infinity"):
        lorax.quantize(tree, targets="block/kernel", **how)
