"""Every primitive over a quantised weight, alone and under a low-rank change: as with the dequantised one, in float64.

The cases are those of plain weights, whose odd sizes make flat blocks, and wider ones whose blocks keep the axes.
"""

import functools
import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_rules import (
    CASES,
    GROUPS,
    IN_OUT,
    STACKED,
    Axes,
    Case,
    close,
    loss_of,
    run,
    sharded,
    sharded_out,
    weight,
    widened,
    x,
)

import lorax
from lorax import LoraSpec, LoraxError, LowRank, Quantized, adapt, join, lift, merge, quantize, split
from lorax.quant import quantize_weight

OUT_2, IN_2 = Axes((), (0,), (1, 2)), Axes((), (0, 1), (2,))

WIDE = [
    Case("wide matmul", (64, 32), IN_OUT, lambda w, x: x @ w, (x(5, 64),)),
    Case("wide transposed", (64, 32), IN_OUT, lambda w, x: x @ w.T, (x(2, 3, 32),)),
    Case("wide on the left", (64, 32), IN_OUT, lambda w, x: w.T @ x, (x(64, 3),)),
    Case(
        "wide heads out", (64, 2, 3), Axes((), (0,), (1, 2)), lambda w, x: jnp.einsum("td,dhk->thk", x, w), (x(4, 64),)
    ),
    Case(
        "wide heads in",
        (2, 32, 5),
        Axes((), (0, 1), (2,)),
        lambda w, x: jnp.einsum("thk,hkd->td", x, w),
        (x(4, 2, 32),),
    ),
    Case("wide experts", (3, 32, 5), STACKED, lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (x(3, 4, 32),)),
    Case("wide scan", (3, 32, 64), STACKED, run(lambda w: 0.1 * w), (0.3 * x(4, 32),), (1,), 0.1),
    Case(
        "wide scan reversed", (3, 32, 64), STACKED, run(lambda w: 0.1 * w, reverse=True), (0.3 * x(4, 32),), (1,), 0.1
    ),
    Case("wide cast", (64, 32), IN_OUT, lambda w, x: x @ (0.5 * w.astype(x.dtype)), (x(5, 64),)),
    Case("wide reshape", (64, 6), IN_OUT, lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(64, 2, 3)), (x(4, 64),)),
    Case("wide shard_map, summed axis", (128, 5), IN_OUT, sharded, (x(3, 128),)),
    Case("wide shard_map, kept axis", (64, 8), IN_OUT, sharded_out, (x(3, 64),)),
    Case("wide slice", (64, 32), IN_OUT, lambda w, x: x @ w[:, 3:20], (x(5, 64),)),
    Case("wide ragged", (4, 32, 5), STACKED, lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray(GROUPS)), (x(6, 32),)),
    Case(
        "wide remat in scan",
        (3, 32, 32),
        STACKED,
        lambda w, x: jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, w)[0],
        (0.3 * x(4, 32),),
        (3,),
        0.1,
    ),
]
# Flat blocks cross the axes, and cannot be given to devices by them.
UNSPLIT = [case for case in CASES if case.name.startswith("shard_map")]
CASES = [case for case in CASES if case not in UNSPLIT]
EACH = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES + WIDE])


@functools.cache
def quantised_base(name: str) -> Quantized:
    case = next(case for case in [*CASES, *WIDE, *UNSPLIT] if case.name == name)
    return quantize_weight("w", weight(case, 1).base, case.axes, block_size=32)


def packed(case: Case) -> LowRank:
    """The case's weight over a quantised base."""
    return replace(weight(case, case.ranks[-1]), base=quantised_base(case.name))


def dense64(w: LowRank) -> LowRank:
    """The same over the values that the base stands for."""
    return widened(replace(w, base=jax.jit(lambda base: base.dense())(w.base)))


@EACH
def test_lifted_equals_dequantised(case):
    w = packed(case)
    inputs = tuple(map(jnp.asarray, case.inputs))
    places = tuple(i for i, a in enumerate(inputs) if jnp.issubdtype(a.dtype, jnp.floating))
    differentiable = case.extra.get("grad", True)

    def loss(factors, floats, base, function):
        whole = list(inputs)
        for i, a in zip(places, floats, strict=True):
            whole[i] = a
        return loss_of(function)(replace(w, base=base, A=factors[0], B=factors[1]), *whole)

    arrays = ((w.A, w.B), tuple(inputs[i] for i in places))

    # One program for all of it: compiling is what these tests spend their time on.
    def ours(factors, floats, base):
        here = replace(w, base=base, A=factors[0], B=factors[1])
        values = lift(case.fn)(here, *inputs), lift(case.fn)(base, *inputs)
        if not differentiable:
            return values, None
        return values, jax.grad(lambda f, x: loss(f, x, base, lift(case.fn)), (0, 1))(factors, floats)

    values, grads = jax.jit(ours)(*arrays, w.base)
    with jax.enable_x64(True):
        exact, wide = dense64(w), widened(inputs)
        theirs = jax.jit(lambda w, *xs: (case.fn(merge({"w": w})["w"], *xs), case.fn(w.base, *xs)))(exact, *wide)
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(theirs), strict=True):
            close(a, b)
        if grads is None:
            return
        merged = lambda w, *xs: case.fn(merge({"w": w})["w"], *xs)  # noqa: E731
        through = jax.jit(jax.grad(lambda f, x: loss(f, x, exact.base, merged), (0, 1)))(*widened(arrays))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(through), strict=True):
            if np.abs(np.asarray(b)).max() > 0:
                close(a, b)
            else:
                assert np.abs(np.asarray(a)).max() == 0


@pytest.mark.parametrize("case", UNSPLIT, ids=[case.name for case in UNSPLIT])
def test_flat_blocks_cannot_be_split_by_shard_map(case):
    with pytest.raises(LoraxError, match=r"shard_map.*no multiple of 32, so it cannot be split"):
        lift(case.fn)(packed(case), *case.inputs)


def test_blocks_are_flat_in_some_cases_and_keep_the_axes_in_others():
    assert all(quantised_base(case.name).array.is_regular for case in WIDE[:3])
    assert not any(quantised_base(case.name).array.is_regular for case in CASES[:3])


@pytest.mark.optimised
def test_a_lookup_dequantises_its_rows_alone():
    table = quantize({"embedding": x_table()}, targets="*")["embedding"]
    ids = jnp.array([[3, 1002, 3], [0, 7, 500]])
    fn = lift(lambda table, ids: table[ids])
    np.testing.assert_array_equal(fn(table, ids), table.dense()[ids])
    text = jax.jit(fn).lower(table, ids).compile().as_text()
    assert re.search(r"u8\[1003,32\]", text)
    assert not re.search(r"(f32|bf16)\[1003,", text)


def x_table():
    return jnp.asarray(x(1003, 64))


def test_a_tied_table_is_looked_up_and_multiplied():
    rng = np.random.default_rng(0)
    fn = lambda p, ids: jnp.tanh(p["embedding"][ids]) @ p["embedding"].T  # noqa: E731
    params = quantize({"embedding": jnp.asarray(rng.normal(size=(31, 64)), jnp.float32)}, targets="*")
    ids = jnp.array([[3, 30, 3]])
    adapted = adapt(jax.random.key(0), params, LoraSpec(targets="*", rank=3), fn=fn, args=(ids,))
    leaf = adapted["embedding"]
    adapted["embedding"] = replace(leaf, B=jnp.asarray(rng.normal(size=leaf.B.shape), jnp.float32) * 0.1)
    close(lift(fn)(adapted, ids), fn(merge(adapted), ids))


def test_nothing_of_the_base_has_a_gradient():
    w = packed(WIDE[0])
    grads = jax.grad(lambda w, x: loss_of(lift(WIDE[0].fn))(w, x), allow_int=True)(w, jnp.asarray(WIDE[0].inputs[0]))
    for leaf in jax.tree.leaves(grads.base):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()
    assert np.asarray(grads.B).any()


@pytest.mark.optimised
@pytest.mark.parametrize("split_axis", ["in", "out"])
def test_a_mesh_splits_the_codes(split_axis):
    """Codes and scales stay where they are: a product over split inputs ends in one sum, over split outputs in none."""
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    w = quantize({"kernel": jnp.asarray(x(256, 128))}, targets="*", double_quant=False)["kernel"]
    place = NamedSharding(mesh, P("m", None) if split_axis == "out" else P(None, "m"))
    array = replace(w.array, codes=jax.device_put(w.array.codes, place), scales=jax.device_put(w.array.scales, place))
    rows = jnp.asarray(x(5, 256))
    rows = jax.device_put(rows, NamedSharding(mesh, P(None, "m"))) if split_axis == "in" else rows
    fn = jax.jit(lift(lambda w, x: x @ w))
    close(fn(Quantized(array, w.order), rows), np.asarray(rows, np.float64) @ np.asarray(w.dense(), np.float64))
    text = fn.lower(Quantized(array, w.order), rows).compile().as_text()
    assert len(re.findall(r"all-reduce(-start)?\(", text)) == (split_axis == "in")
    assert not re.search(r"all-gather(-start)?\([^)]*u8", text)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7)(nn.relu(nn.Dense(64)(x)))


def test_linen():
    model, inputs = Net(), jnp.asarray(x(3, 5))
    params = quantize(model.init(jax.random.key(0), inputs), fn=model.apply, args=(inputs,))
    assert isinstance(params["params"]["Dense_1"]["kernel"], Quantized)
    adapted = adapt(jax.random.key(1), params, LoraSpec(rank=2), fn=model.apply, args=(inputs,))
    close(lift(model.apply)(adapted, inputs), model.apply(merge(adapted), inputs))


def test_nnx():
    module = nnx.Linear(64, 5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    apply = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    params, inputs = nnx.to_pure_dict(state), jnp.asarray(x(3, 64))
    packed_params = quantize(params, targets="kernel")
    close(lift(apply)(packed_params, inputs), apply(lorax.dequantize(packed_params), inputs))


def test_training_moves_the_factors_and_nothing_else():
    fn = WIDE[0].fn
    tree = {"w": packed(WIDE[0])}
    trainable, frozen = split(tree)
    names = {type(leaf).__name__ for leaf in jax.tree.leaves(trainable)}
    assert names
    assert len(jax.tree.leaves(trainable)) == 2, "A and B"
    loss = lambda t: jnp.sum(lift(lambda p, x: fn(p["w"], x))(join(t, frozen), WIDE[0].inputs[0]) ** 2)  # noqa: E731
    grads = jax.grad(loss)(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
