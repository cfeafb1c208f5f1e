"""Every way a weight reaches arithmetic: lifted equals merged, value and both gradients, against float64.

One table of cases. Each has a weight with the roles of its axes, a function of the dense weight, and its inputs. B is
never zero, sizes are odd, ranks are 1, 3 and 16 where they fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import Axes, Concat, Full, LoraxError, LowRank, lift, merge

IN_OUT = Axes((), (0,), (1,))
STACKED = Axes((0,), (1,), (2,))


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    axes: Axes
    fn: Any
    inputs: tuple[Any, ...]
    ranks: tuple[int, ...] = (1, 3)
    scale: float = 0.7
    extra: dict[str, Any] = field(default_factory=dict)


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def conv(numbers, groups=1, strides=(2, 1), dilation=(1, 1)):
    return lambda w, x: jax.lax.conv_general_dilated(
        x, w, strides, "SAME", rhs_dilation=dilation, dimension_numbers=numbers, feature_group_count=groups
    )


NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
KERNEL = Axes((), (0, 1, 2), (3,))
OIHW = Axes((), (1, 2, 3), (0,))
GROUPS = np.array([2, 0, 3, 1], np.int32)
IDS = np.array([[1, 3, 6], [0, 0, 2]], np.int32)


def step(c, w):
    return jnp.tanh(c @ w @ w.T), c.sum(-1)


def run(xs_of, **how):
    return lambda w, x: jax.lax.scan(step, x, xs_of(w), **how)


def nested_scan(w, x):
    return jax.lax.scan(lambda c, ws: jax.lax.scan(step, c, ws), x, w)


@jax.custom_jvp
def own_jvp(x, w):
    return x @ w


own_jvp.defjvp(lambda p, t: (own_jvp(*p), 3 * (t[0] @ p[1]) + 2 * (p[0] @ t[1])))


@jax.custom_vjp
def own_vjp(x, w):
    return x @ w


own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, ct: (2 * ct @ r[1].T, 5 * r[0].T @ ct))


@jax.custom_vjp
def no_gradient_for_x(x, w):
    return x @ w


no_gradient_for_x.defvjp(lambda x, w: (x @ w, x), lambda x, ct: (None, x.T @ ct))


@jax.custom_vjp
def rows_times(i, x, w):
    return x[i] @ w


rows_times.defvjp(lambda i, x, w: (x[i] @ w, (i, x, w)), lambda r, ct: (None, 0 * r[1], r[1][r[0]].T @ ct))


def sharded(w, x):
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    body = lambda x, w: jax.lax.psum(x @ w, "m")  # noqa: E731
    return jax.shard_map(body, mesh=mesh, in_specs=(P(None, "m"), P("m", None)), out_specs=P())(x, w)


def sharded_out(w, x):
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P(None, "m")), out_specs=P(None, "m"))(x, w)


def constrained(w, x):
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P("m", None)))


def counted(w, x):
    def body(state):
        i, c = state
        return i + 1, jnp.tanh(c @ w @ w.T)

    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


def inner_jit_gives_a_weight(w, x):
    return x @ jax.jit(lambda w, i: jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False))(w, 2)


CASES = [
    Case("matmul", (33, 17), IN_OUT, lambda w, x: x @ w, (x(5, 33),), (1, 3, 16)),
    Case("matmul of a batch", (33, 17), IN_OUT, lambda w, x: x @ w, (x(2, 5, 33),), (1, 3, 16)),
    Case("matmul transposed", (33, 17), IN_OUT, lambda w, x: x @ w.T, (x(5, 17),), (1, 3, 16)),
    Case("roles transposed", (3, 5), Axes((), (1,), (0,)), lambda w, x: x @ w.T, (x(4, 5),)),
    Case("weight on the left", (3, 5), IN_OUT, lambda w, x: w @ x, (x(5, 7),)),
    Case("weight on the left, batch", (3, 5), IN_OUT, lambda w, x: w.T @ x, (x(2, 3, 7),)),
    Case("heads out", (5, 2, 3), Axes((), (0,), (1, 2)), lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (x(2, 4, 5),)),
    Case(
        "heads in", (2, 3, 5), Axes((), (0, 1), (2,)), lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (x(2, 4, 2, 3),)
    ),
    Case(
        "heads in, one summed",
        (3, 2, 5),
        Axes((), (0, 1), (2,)),
        lambda w, x: jnp.einsum("bh,hkd->bkd", x, w),
        (x(4, 3),),
    ),
    Case("experts", (4, 3, 5), STACKED, lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (x(4, 6, 3),)),
    Case("experts, one input", (4, 3, 5), STACKED, lambda w, x: jnp.einsum("bd,edf->bef", x, w), (x(6, 3),)),
    Case(
        "experts, last axis",
        (3, 5, 4),
        Axes((2,), (0,), (1,)),
        lambda w, x: jnp.einsum("ebd,dfe->bfe", x, w),
        (x(4, 6, 3),),
    ),
    Case("ragged", (4, 3, 5), STACKED, lambda w, x: jax.lax.ragged_dot(x, w, GROUPS), (x(6, 3),)),
    Case("ragged to one column", (4, 3, 1), STACKED, lambda w, x: jax.lax.ragged_dot(x, w, GROUPS), (x(6, 3),), (1,)),
    Case("expert by index", (4, 3, 5), STACKED, lambda w, x: jnp.einsum("bd,bdf->bf", x, w[GROUPS[:3]]), (x(3, 3),)),
    Case("convolution", (3, 3, 4, 7), KERNEL, conv(NHWC), (x(2, 7, 5, 4),)),
    Case("convolution, groups", (3, 1, 2, 6), KERNEL, conv(NHWC, 3), (x(2, 7, 5, 6),)),
    Case("convolution, dilated, NCHW", (7, 4, 3, 3), OIHW, conv(NCHW, 1, (1, 1), (2, 1)), (x(2, 4, 7, 5),)),
    Case(
        "convolution 1d", (3, 4, 7), Axes((), (0, 1), (2,)), conv(("NWC", "WIO", "NWC"), 1, (2,), (1,)), (x(2, 9, 4),)
    ),
    Case("embedding", (7, 5), IN_OUT, lambda w: jnp.take(w, IDS, axis=0), ()),
    Case("embedding, columns", (5, 7), Axes((), (1,), (0,)), lambda w: jnp.take(w, IDS, axis=1), ()),
    Case("embedding, clipped", (7, 5), IN_OUT, lambda w: jnp.take(w, IDS * 3, axis=0, mode="clip"), ()),
    Case("embedding, filled", (7, 5), IN_OUT, lambda w: jnp.take(w, IDS * 3, axis=0, mode="fill", fill_value=2.0), ()),
    Case("embedding, from the end", (7, 5), IN_OUT, lambda w: w[-IDS], ()),
    Case("tied embedding", (7, 5), IN_OUT, lambda w: jnp.tanh(jnp.take(w, IDS, axis=0)) @ w.T, ()),
    Case("reshape", (5, 2, 3), Axes((), (0,), (1, 2)), lambda w, x: x @ w.reshape(5, 6), (x(4, 5),)),
    Case("reshape apart", (5, 6), IN_OUT, lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(5, 2, 3)), (x(4, 5),)),
    Case("reshape with ones", (5, 6), IN_OUT, lambda w, x: x @ w.reshape(1, 5, 1, 6)[0, :, 0], (x(4, 5),)),
    Case(
        "transpose and reshape",
        (3, 2, 4),
        Axes((), (0,), (1, 2)),
        lambda w, x: x @ w.transpose(1, 2, 0).reshape(8, 3),
        (x(4, 8),),
    ),
    Case("expand and squeeze", (3, 5), IN_OUT, lambda w, x: x @ jnp.squeeze(w[None, :, :, None], (0, 3)), (x(4, 3),)),
    Case("slices", (5, 6), IN_OUT, lambda w, x: x @ w[1:4, ::2], (x(4, 3),)),
    Case(
        "dynamic slice",
        (5, 6),
        IN_OUT,
        lambda w, x: x @ jax.lax.dynamic_slice(w, (jnp.int32(1), jnp.int32(2)), (3, 2)),
        (x(4, 3),),
    ),
    Case("split", (3, 6), IN_OUT, lambda w, x: sum(x @ part for part in jnp.split(w, 3, axis=1)), (x(4, 3),)),
    Case("unstack", (4, 3, 5), STACKED, lambda w, x: x @ jnp.unstack(w)[1] + x @ w[3], (x(4, 3),)),
    Case(
        "broadcast, kept",
        (3, 5),
        IN_OUT,
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, jnp.broadcast_to(w, (4, 3, 5))),
        (x(4, 2, 3),),
    ),
    Case(
        "broadcast, summed",
        (3, 5),
        IN_OUT,
        lambda w, x: jnp.einsum("ebd,edf->bf", x, jnp.broadcast_to(w, (4, 3, 5))),
        (x(4, 2, 3),),
    ),
    Case(
        "broadcast, free",
        (3, 5),
        IN_OUT,
        lambda w, x: jnp.einsum("bd,edf->bef", x, jnp.broadcast_to(w, (4, 3, 5))),
        (x(2, 3),),
    ),
    Case("constants", (3, 5), IN_OUT, lambda w, x: x @ (-w * 0.5) / 3 + x @ (w / 2), (x(4, 3),)),
    Case(
        "copy and barrier",
        (3, 5),
        IN_OUT,
        lambda w, x: x @ jax.lax.optimization_barrier((jnp.array(w, copy=True), x))[0],
        (x(4, 3),),
    ),
    Case("sharding constraint", (4, 5), IN_OUT, constrained, (x(3, 4),)),
    Case("shard_map, summed axis", (8, 5), IN_OUT, sharded, (x(3, 8),)),
    Case("shard_map, kept axis", (3, 8), IN_OUT, sharded_out, (x(5, 3),)),
    Case("scan", (4, 3, 5), STACKED, run(lambda w: w), (0.15 * x(6, 3),), (1, 3), 0.1),
    Case("scan, reversed", (4, 3, 5), STACKED, run(lambda w: w, reverse=True), (0.2 * x(6, 3),), (1,), 0.1),
    Case("scan, unrolled", (5, 3, 5), STACKED, run(lambda w: w, unroll=2), (0.3 * x(6, 3),), (1,), 0.1),
    Case("scan of scans", (2, 3, 3, 5), Axes((0, 1), (2,), (3,)), nested_scan, (0.3 * x(6, 3),), (1,), 0.1),
    Case(
        "scan, closed over",
        (3, 5),
        IN_OUT,
        lambda w, x: jax.lax.scan(lambda c, _: step(c, w), x, length=3),
        (0.3 * x(4, 3),),
        (1,),
        0.1,
    ),
    Case("while", (3, 5), IN_OUT, counted, (0.3 * x(4, 3),), (1,), 0.1, {"grad": False}),
    Case(
        "fori",
        (3, 5),
        IN_OUT,
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, c: step(c, w)[0], x),
        (0.3 * x(4, 3),),
        (1,),
        0.1,
    ),
    Case(
        "cond",
        (3, 5),
        IN_OUT,
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: 2 * x @ w, x),
        (x(4, 3),),
    ),
    Case(
        "switch",
        (3, 5),
        IN_OUT,
        lambda w, x: jax.lax.switch(2, [lambda x, k=k: k * x @ w for k in (1, 2, 3)], x),
        (x(4, 3),),
    ),
    Case("jit in jit", (3, 5), IN_OUT, jax.jit(lambda w, x: jax.jit(lambda x, w: x @ w)(x, w)), (x(4, 3),)),
    Case("jit that gives a weight", (4, 3, 5), STACKED, inner_jit_gives_a_weight, (x(4, 3),)),
    Case("checkpoint", (3, 5), IN_OUT, jax.checkpoint(lambda w, x: jnp.sin(x @ w)), (x(4, 3),)),
    Case("custom_jvp", (3, 5), IN_OUT, lambda w, x: own_jvp(jnp.sin(x), w), (x(4, 3),)),
    Case("custom_vjp", (3, 5), IN_OUT, lambda w, x: own_vjp(jnp.sin(x), w), (x(4, 3),)),
    Case(
        "custom_vjp in scan",
        (4, 3, 5),
        STACKED,
        lambda w, x: jax.lax.scan(lambda c, w: (c, own_vjp(c, w)), x, w)[1],
        (x(4, 3),),
    ),
    Case("custom_vjp without one gradient", (3, 5), IN_OUT, lambda w, x: no_gradient_for_x(x, w), (x(4, 3),)),
    Case("custom_vjp with an integer", (3, 5), IN_OUT, lambda w, x: rows_times(jnp.array([2, 0]), x, w), (x(4, 3),)),
    Case("vmap inside", (3, 5), IN_OUT, lambda w, x: jax.vmap(lambda row: row @ w)(x), (x(4, 3),)),
    Case("vmap over experts", (4, 3, 5), STACKED, lambda w, x: jax.vmap(lambda x, w: x @ w)(x, w), (x(4, 6, 3),)),
    Case(
        "gradient inside",
        (3, 5),
        IN_OUT,
        lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x),
        (0.3 * x(4, 3),),
        (1,),
        0.1,
    ),
]


def weight(case: Case, rank: int) -> LowRank:
    rng = np.random.default_rng(rank)
    stack, ins, outs = (tuple(case.shape[i] for i in g) for g in (case.axes.stack, case.axes.inputs, case.axes.outputs))
    draw = lambda *s: jnp.asarray(rng.normal(size=s).astype(np.float32))  # noqa: E731
    return LowRank(
        draw(*case.shape), draw(*stack, *ins, rank), draw(*stack, rank, *outs), jnp.float32(case.scale), case.axes
    )


def loss_of(fn):
    return lambda w, *inputs: sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(fn(w, *inputs)))


def widened(tree):
    """The same numbers in float64, by way of NumPy: nothing to compile."""
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a).astype(np.float64)) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    top = np.abs(want).max()
    assert top > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * top)


@pytest.mark.parametrize(("case", "rank"), [pytest.param(c, r, id=f"{c.name}-r{r}") for c in CASES for r in c.ranks])
def test_lifted_equals_merged(case, rank):
    w = weight(case, rank)
    inputs = tuple(map(jnp.asarray, case.inputs))
    differentiable = case.extra.get("grad", True)
    got, grads = program(lift(case.fn), differentiable)(w, *inputs)
    with jax.enable_x64(True):
        exact, wide = widened(w), widened(inputs)
        want, through = program(lambda w, *xs: case.fn(merge({"w": w})["w"], *xs), differentiable)(exact, *wide)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(a, b)
        if differentiable:
            close(grads.A, through.A)
            close(grads.B, through.B)


def program(fn, differentiable):
    """Value and gradient in one program: compiling is what these tests spend their time on."""
    return jax.jit(lambda w, *xs: (fn(w, *xs), jax.grad(loss_of(fn))(w, *xs) if differentiable else None))


@pytest.mark.parametrize("case", CASES[::9], ids=[case.name for case in CASES[::9]])
def test_an_operation_at_a_time_computes_the_same(case):
    w, inputs = weight(case, case.ranks[-1]), tuple(map(jnp.asarray, case.inputs))
    for a, b in zip(
        *(jax.tree.leaves(fn(w, *inputs)) for fn in (lift(case.fn), program(lift(case.fn), False))), strict=True
    ):
        close(a, b)


def test_bfloat16_weights_keep_float32_factors():
    case = CASES[0]
    w = weight(case, 3)
    inputs = jnp.asarray(case.inputs[0]).astype(jnp.bfloat16)
    half = LowRank(w.base.astype(jnp.bfloat16), w.A, w.B, w.scale, w.axes)
    got = lift(case.fn)(half, inputs)
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), case.fn(merge(w), inputs.astype(jnp.float32)), 0.03)
    grads = jax.grad(lambda w: loss_of(lift(case.fn))(w, inputs).astype(jnp.float32))(half)
    assert (grads.A.dtype, grads.B.dtype) == (jnp.float32, jnp.float32)


def test_a_cast_inside_the_function_casts_the_base_alone():
    w = weight(CASES[0], 3)
    fn = lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)  # noqa: E731
    close(
        lift(fn)(w, CASES[0].inputs[0]).astype(jnp.float32), fn(merge(w), CASES[0].inputs[0]).astype(jnp.float32), 0.03
    )


def test_pieces_cut_the_scan_and_keep_low_rank_parts():
    whole = weight(Case("", (5, 3, 5), STACKED, None, ()), 2)
    x0 = jnp.asarray(0.3 * x(6, 3))
    low = LowRank(whole.base[2:], whole.A[2:] * 0.1, whole.B[2:], whole.scale, STACKED)
    cut = Concat((whole.base[:1], Full(whole.base[1:2]), low))
    for reverse in (False, True):
        fn = run(lambda w: w, reverse=reverse)
        for got, want in zip(lift(fn)(cut, x0), fn(merge(cut), x0), strict=True):
            close(got, want)
        assert str(jax.make_jaxpr(lift(fn))(cut, x0)).count("scan[") == 3


def test_pieces_are_taken_one_by_one_by_slices():
    cut = Concat((jnp.ones((2, 3, 5)), Full(2 * jnp.ones((1, 3, 5)))))
    one = jnp.ones((1, 3))
    assert float(lift(lambda w, x: (x @ w[2])[0, 0])(cut, one)) == 6.0
    assert float(lift(lambda w, x: jnp.einsum("bd,ldf->blf", x, w * 2.0).sum())(cut, one)) == 2 * 3 * 5 * (2 + 2)


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda w, x: x @ jnp.sin(w), "`sin`"),
        (lambda w, x: x @ w.reshape(-1).reshape(3, 5), "joins axes of A and B"),
        (lambda w, x: jnp.sum(w), "`reduce_sum`"),
        (lambda w, x: x @ (w * jnp.ones(5)), "elementwise"),
        (lambda w, x: x @ (w @ w.T), "two structured weights meet"),
        (lambda w, x: jnp.einsum("df,df->", jnp.ones((3, 5)), w), "pass fn"),
        (lambda w, x: jax.lax.scan(lambda c, _: (2 * c, None), w, length=2)[0], "carry"),
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: w, lambda: 2 * w), "result of a cond"),
    ],
    ids=["sin", "flatten", "sum", "mask", "two", "contradiction", "carry", "cond"],
)
def test_an_operation_without_a_rule_names_path_primitive_and_way_out(fn, says):
    tree = {"layers": {"kernel": weight(Case("", (3, 5), IN_OUT, None, ()), 2)}}
    with pytest.raises(LoraxError, match="layers/kernel") as caught:
        lift(lambda p, x: fn(p["layers"]["kernel"], x))(tree, jnp.ones((4, 3)))
    message = str(caught.value)
    assert says in message
    assert 'on_unsupported="materialize"' in message
    assert "test_rules.py" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ jnp.sin(w),
        lambda w, x: x @ (w @ w.T),
        lambda w, x: jax.lax.scan(lambda c, _: (2 * c, x @ c), w, length=2)[1],
    ],
)
def test_materialize_builds_the_dense_weight_there(fn):
    w = weight(Case("", (3, 5), IN_OUT, None, ()), 2)
    close(lift(fn, on_unsupported="materialize")(w, jnp.ones((4, 3))), fn(merge(w), jnp.ones((4, 3))))


def test_returning_the_weight_itself_is_an_error():
    w = weight(Case("", (3, 5), IN_OUT, None, ()), 2)
    with pytest.raises(LoraxError, match="w: the lifted function returns"):
        lift(lambda p: p["w"])({"w": w})


def test_wrong_stack_is_a_contradiction_that_says_to_pass_fn():
    # (d, heads, k) read as two stacked matrices: what `adapt` assumes without fn.
    w = weight(Case("", (5, 2, 3), STACKED, None, ()), 1)
    with pytest.raises(LoraxError, match=r"is stacked, and here it is summed.*pass fn"):
        lift(lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["q"]))({"q": w}, jnp.ones((1, 2, 5)))


def test_arguments_that_are_no_arrays_reach_the_function():
    w = weight(Case("", (3, 5), IN_OUT, None, ()), 2)

    def fn(w, x, mode, *, train=False):
        assert mode == "twice"
        return 2 * (x @ w) if train else x @ w

    got = lift(fn)(w, jnp.ones((4, 3)), "twice", train=True)
    close(got, 2 * (jnp.ones((4, 3)) @ merge(w)))


def test_vmap_over_adapters_leaves_one_plain_matmul():
    w = weight(Case("", (33, 17), IN_OUT, None, ()), 3)
    many = LowRank(w.base, jnp.stack([w.A, 2 * w.A]), jnp.stack([w.B, -w.B]), jnp.stack([w.scale, w.scale]), w.axes)
    axes = LowRank(None, 0, 0, 0, w.axes)
    xs = jnp.asarray(x(2, 5, 33))
    mapped = jax.vmap(lift(lambda w, x: x @ w), in_axes=(axes, 0))
    got = mapped(many, xs)
    for i, sign in enumerate((1.0, -2.0)):
        close(got[i], xs[i] @ (w.base + sign * (merge(w) - w.base)))
    dots = [e for e in jax.make_jaxpr(mapped)(many, xs).eqns if e.primitive.name == "dot_general"]
    base = [e for e in dots if e.invars[1].aval.shape == (33, 17)]
    assert len(base) == 1
    assert base[0].params["dimension_numbers"][1] == ((), ())
