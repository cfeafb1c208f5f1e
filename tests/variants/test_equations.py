"""Each variant's equation: lifted against the equation written out in float64, value and gradients; counts; LoRA+."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import Axes, Dora, FrozenA, LoraSpec, LoraxError, LowRank, Vera, lift, merge
from lorax.models.config import ModelConfig
from lorax.models.model import Model
from lorax.variants import dora, rslora, vera

KEY = jax.random.key(0)
IN_OUT, STACKED = Axes((), (0,), (1,)), Axes((0,), (1,), (2,))
IDS = np.array([[1, 3, 6], [0, 0, 2]], np.int32)


def x(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def step(c, w):
    return jnp.tanh(c @ w @ w.T), c.sum(-1)


# Every way of use in one program: (shape, axes, function of the weight).
USES = {
    "matmul": ((7, 5), IN_OUT, lambda w, x: x(4, 7) @ w),
    "roles turned": ((7, 5), Axes((), (1,), (0,)), lambda w, x: w @ x(5, 3)),
    "heads in": ((2, 3, 5), Axes((), (0, 1), (2,)), lambda w, x: jnp.einsum("bhk,hkd->bd", x(4, 2, 3), w)),
    "experts, one input": ((4, 3, 5), STACKED, lambda w, x: jnp.einsum("bd,edf->bef", x(6, 3), w)),
    "last axis stacked": ((3, 5, 4), Axes((2,), (0,), (1,)), lambda w, x: jnp.einsum("ebd,dfe->bfe", x(4, 6, 3), w)),
    "scan": ((4, 3, 5), STACKED, lambda w, x: jax.lax.scan(step, 0.3 * x(6, 3), w)),
    "scan of scans": (
        (2, 3, 3, 5),
        Axes((0, 1), (2,), (3,)),
        lambda w, x: jax.lax.scan(lambda c, ws: jax.lax.scan(step, c, ws), 0.3 * x(6, 3), w),
    ),
    "convolution": (
        (3, 4, 7),
        Axes((), (0, 1), (2,)),
        lambda w, x: jax.lax.conv_general_dilated(x(2, 9, 4), w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    ),
    "embedding, filled": ((7, 5), IN_OUT, lambda w, x: jnp.take(w, 3 * IDS, axis=0, mode="fill", fill_value=0.0)),
    "tied": ((7, 5), IN_OUT, lambda w, x: jnp.tanh(jnp.take(w, IDS, axis=0)) @ w.T),
    "expert by index": ((4, 3, 5), STACKED, lambda w, x: jnp.einsum("bd,bdf->bf", x(3, 3), w[jnp.array([2, 0, 3])])),
    "moved": ((5, 2, 3), Axes((), (0,), (1, 2)), lambda w, x: x(4, 6) @ w.transpose(1, 2, 0).reshape(6, 5)),
    "cut": ((5, 6), IN_OUT, lambda w, x: x(4, 5) @ w[:, ::2] / 3 + x(4, 5) @ jnp.split(-w * 0.5, 2, axis=1)[1]),
    "checkpoint": ((3, 5), IN_OUT, lambda w, x: jax.checkpoint(lambda w: jnp.sin(x(4, 3) @ w))(w)),
}


@jax.custom_jvp
def own_jvp(w):
    return jnp.sum(x(4, 3) @ w)


own_jvp.defjvp(lambda p, t: (own_jvp(*p), jnp.sum(x(4, 3) @ t[0])))


def low_rank(shape, axes, rank=2):
    rng = np.random.default_rng(len(shape) + rank)
    draw = lambda *s: jnp.asarray(rng.normal(size=s).astype(np.float32))  # noqa: E731
    stack, ins, outs = (tuple(shape[i] for i in group) for group in (axes.stack, axes.inputs, axes.outputs))
    return LowRank(draw(*shape), draw(*stack, *ins, rank), draw(*stack, rank, *outs), jnp.float32(0.4), axes)


def as_dora(shape, axes):
    leaf = dora.build(low_rank(shape, axes))
    # Lengths that are nobody's: m at the start would hide its own gradient's scale.
    return Dora(leaf.weight, leaf.magnitude * jnp.linspace(0.5, 1.5, leaf.magnitude.size).reshape(leaf.magnitude.shape))


def as_vera(shape, axes):
    leaf = vera.build(low_rank(shape, axes), KEY, jnp.float32)
    move = lambda v, seed: v + jnp.asarray(np.random.default_rng(seed).normal(size=v.shape), jnp.float32)  # noqa: E731
    return Vera(leaf.base, leaf.A, leaf.B, move(leaf.d, 1), move(leaf.b, 2), axes)


def written_out(leaf):
    """The weight by the paper's equation, with what it says about gradients."""
    if isinstance(leaf, Dora):
        v = merge({"w": leaf.weight})["w"]
        stack, outs = leaf.axes.stack, leaf.axes.outputs
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v * v, axis=leaf.axes.inputs, keepdims=True)))
        shape = [size if axis in (*stack, *outs) else 1 for axis, size in enumerate(v.shape)]
        order = sorted((*stack, *outs))
        m = jnp.transpose(leaf.magnitude, [(*stack, *outs).index(axis) for axis in order]).reshape(shape)
        return m * v / norm
    s, i = len(leaf.axes.stack), len(leaf.axes.inputs)
    stack, ins, outs = leaf.d.shape[:s], leaf.A.shape[:i], leaf.B.shape[1:]
    flat = jnp.einsum("ir,sr,ro,so->sio", *(leaf.A.reshape(-1, leaf.rank), leaf.d.reshape(-1, leaf.rank)),
                      *(leaf.B.reshape(leaf.rank, -1), leaf.b.reshape(leaf.d.size // leaf.rank, -1)))  # fmt: skip
    change = flat.reshape(*stack, *ins, *outs)
    return leaf.base + jnp.transpose(change, np.argsort(leaf.axes.order))


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


def in_dtype(fn):
    """A use with inputs in the weight's dtype."""
    return lambda w: fn(w, lambda *shape: jnp.asarray(x(*shape), w.dtype))


def value_and_gradients(of):
    """One program for all uses."""

    def run(leaves):
        outs = {name: in_dtype(fn)(of(leaves[name])) for name, (_, _, fn) in USES.items()}
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(outs)), outs

    def lifted(leaves):
        outs = {name: lift(in_dtype(fn))(leaves[name]) for name, (_, _, fn) in USES.items()}
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(outs)), outs

    return jax.jit(jax.value_and_grad(lifted if of is None else run, has_aux=True))


@pytest.mark.parametrize("make", [as_dora, as_vera])
def test_lifted_is_the_equation_in_every_use(make):
    leaves = {name: make(shape, axes) for name, (shape, axes, _) in USES.items()}
    (_, got), grads = value_and_gradients(None)(leaves)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), leaves)
        (_, want), through = value_and_gradients(written_out)(wide)
        for leaf in wide.values():
            close(merge({"w": leaf})["w"], written_out(leaf), 1e-12)
    for name in USES:
        close(got[name], want[name])
        close(lorax.split(grads[name])[0], lorax.split(through[name])[0])


def test_dora_starts_at_the_weight_and_its_length_is_the_columns():
    params = {"w": jnp.asarray(x(9, 6)) * 3}
    leaf = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=2, variant="dora"))["w"]
    np.testing.assert_allclose(leaf.magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6)
    np.testing.assert_allclose(lift(lambda w: x(4, 9) @ w)(leaf), x(4, 9) @ params["w"], rtol=1e-5, atol=1e-5)
    # A column that the change takes to nothing has no direction, and no NaN.
    nothing = Dora(LowRank(params["w"], params["w"], -jnp.eye(6), jnp.float32(1), IN_OUT), leaf.magnitude)
    assert np.isfinite(lift(lambda w: x(4, 9) @ w)(nothing)).all()


def test_dora_over_a_quantised_base_and_in_bfloat16():
    # Scaled so that sines of large numbers, three times over, do not magnify the rounding.
    packed = lorax.quantize({"w": jnp.asarray(0.2 * x(3, 64, 8))}, targets="w")
    leaf = lorax.adapt(KEY, packed, LoraSpec(targets="w", rank=2, variant="dora"))["w"]
    scan = lambda w: jax.lax.scan(lambda c, w: (jnp.sin(c @ w @ w.T), None), 0.1 * x(2, 64), w)[0]  # noqa: E731
    np.testing.assert_allclose(lift(scan)(leaf), scan(lorax.dequantize({"w": packed["w"]})["w"]), atol=1e-4)
    half = Dora(low_rank((7, 5), IN_OUT).with_base(jnp.asarray(x(7, 5), jnp.bfloat16)), jnp.ones(5))
    got = lift(lambda w: jnp.asarray(x(4, 7), jnp.bfloat16) @ w)(half)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), x(4, 7) @ np.asarray(half.dense(), np.float32), atol=0.05)


def test_what_dora_cannot_follow_is_refused_with_the_reason():
    leaf = as_dora((4, 3, 5), STACKED)
    with pytest.raises(LoraxError, match="some are summed, others not"):
        lift(lambda p: jnp.einsum("bf,edf->bed", x(6, 5), p["w"]))({"w": leaf})
    with pytest.raises(LoraxError, match="cannot enter a custom_jvp"):
        jax.grad(lambda m: lift(own_jvp)(Dora(low_rank((3, 5), IN_OUT), m)))(jnp.ones(5))
    with pytest.raises(LoraxError, match="w: its change is no sum"):
        lorax.unmerge(merge({"w": leaf}), {"w": leaf})


def test_lora_fa_is_lora_with_a_frozen():
    params = {"w": jnp.asarray(x(7, 5))}
    plain, frozen = (
        lorax.adapt(KEY, params, LoraSpec(targets="w", rank=2, variant=variant))["w"] for variant in ("lora", "lora-fa")
    )
    np.testing.assert_array_equal(plain.A, frozen.A)
    trainable, rest = lorax.split({"w": frozen})
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(2, 5)]
    grad = jax.grad(lambda t: jnp.sum(lift(lambda p: jnp.sin(x(4, 7) @ p["w"]))(lorax.join(t, rest))))(trainable)
    dw = jax.grad(lambda w: jnp.sum(jnp.sin(x(4, 7) @ w)))(params["w"])
    np.testing.assert_allclose(grad["w"].B, frozen.scale * frozen.A.T @ dw, rtol=1e-4, atol=1e-5)


def test_vera_shares_its_factors_and_counts_what_trains():
    params = {"up": jnp.asarray(x(4, 7, 9)), "down": jnp.asarray(x(4, 9, 7)), "one": jnp.asarray(x(7, 9))}
    tree = lorax.adapt(KEY, params, LoraSpec(targets="*", rank=3, variant="vera"))
    np.testing.assert_array_equal(tree["up"].A, tree["one"].A)
    np.testing.assert_allclose(tree["up"].A * (7 / 9) ** 0.5, tree["down"].A[:7], rtol=1e-6)
    np.testing.assert_array_equal(tree["down"].B, tree["one"].B[:, :7])
    assert lorax.report(tree).trainable == 4 * (3 + 9) + 4 * (3 + 7) + (3 + 9)
    assert float(tree["up"].d[0, 0]) == pytest.approx(0.1)
    for name, leaf in lorax.merge(tree).items():
        np.testing.assert_array_equal(leaf, params[name])
    wide = vera.shared(KEY, 500, 64)
    assert float(wide.std()) == pytest.approx(1 / 8, rel=0.02)


def test_rslora_keeps_the_size_of_a_change_at_any_rank():
    assert [LoraSpec(rank=r, alpha=8.0, scaling="rslora").scale_for("w") for r in (1, 4, 16)] == [8, 4, 2]
    assert rslora.scale(8.0, 64) == 1
    # With A of unit size and a unit gradient, one step of B moves the output by s^2 r: with alpha / sqrt(r), alpha^2.
    sizes = []
    for rank in (4, 64, 1024):
        a = jax.random.normal(jax.random.key(rank), (rank,))
        sizes.append(float(rslora.scale(1.0, rank) ** 2 * (a @ a)))
    np.testing.assert_allclose(sizes, 1.0, atol=0.5)


def test_lora_plus_gives_b_its_own_rate_under_adam_too():
    params = {"w": jnp.asarray(x(7, 5)), "d": jnp.asarray(x(7, 5)), "bias": jnp.zeros(5)}
    tree = lorax.adapt(KEY, params, LoraSpec(targets=("w", "d"), rank=2, train_also="bias"))
    tree["d"] = dora.build(tree["d"])
    trainable, _ = lorax.split(tree)
    grads = jax.tree.map(lambda v: jnp.ones_like(v) * 0.3, trainable)
    plus, plain = lorax.lora_plus(optax.adam(1e-2), 16.0), optax.adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        fast, slow = (tx.update(grads, tx.init(trainable), trainable)[0] for tx in (plus, plain))
    np.testing.assert_allclose(fast["w"].B, 16 * slow["w"].B)
    np.testing.assert_allclose(fast["d"].weight.B, 16 * slow["d"].weight.B)
    for a, b in ((fast["w"].A, slow["w"].A), (fast["bias"], slow["bias"]), (fast["d"].magnitude, slow["d"].magnitude)):
        np.testing.assert_array_equal(*(jax.tree.leaves(t)[0] for t in (a, b)))
    with pytest.raises(LoraxError, match="ratio must be a positive number"):
        lorax.lora_plus(plain, 0)
    # Through `optimizer`, on the whole tree.
    moved, _ = lorax.optimizer(plus, tree).update(grads, lorax.optimizer(plus, tree).init(trainable), trainable)
    np.testing.assert_allclose(moved["w"].B, fast["w"].B)


def test_the_variants_are_pytrees_that_come_apart_and_together():
    params = {"w": jnp.asarray(x(4, 7, 5))}
    for variant, kind in (("dora", Dora), ("vera", Vera), ("lora-fa", FrozenA)):
        tree = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=2, variant=variant))
        assert isinstance(tree["w"], kind)
        assert tree["w"].shape == (4, 7, 5)
        assert jax.tree.structure(lorax.join(*lorax.split(tree))) == jax.tree.structure(tree)
        back = lorax.attach(params, lorax.extract(tree))
        assert back["w"].base is params["w"]
        assert lorax.extract(tree)["w"].base is None
        assert [row.kind for row in lorax.report(tree).rows] == [kind.KIND]
        assert lorax.report(tree).frozen >= 4 * 7 * 5
        shapes = jax.eval_shape(
            lambda p, v=variant: lorax.adapt(KEY, p, LoraSpec(targets="w", rank=2, variant=v)), params
        )
        assert shapes["w"].shape == (4, 7, 5)
        abstract = lorax.adapt(KEY, jax.eval_shape(lambda: params), LoraSpec(targets="w", rank=2, variant=variant))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
        assert lorax.report(abstract).trainable == lorax.report(tree).trainable


def test_unknown_names_list_the_rows_and_say_where_a_name_belongs():
    with pytest.raises(LoraxError, match="dora, lora, lora-fa, vera"):
        LoraSpec(variant="lokr")
    with pytest.raises(LoraxError, match="'pissa' is a row of init: init='pissa'"):
        LoraSpec(variant="pissa")
    with pytest.raises(LoraxError, match="eva, gaussian, milora"):
        LoraSpec(init="zeros")
    with pytest.raises(LoraxError, match="variant='vera' has its own start"):
        LoraSpec(variant="vera", init="pissa")


def test_counts_of_published_configurations():
    llama = ModelConfig("llama", 128256, 4096, 14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                        tie_embeddings=False)  # fmt: skip
    model = Model.abstract(llama)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def count(**spec):
        return lorax.report(lorax.adapt(KEY, model.params, LoraSpec(**spec), fn=model.apply, args=(ids,))).trainable

    assert count(rank=1) == 2_621_440
    # q and v alone at rank 8: 32 (8 (4096 + 4096) + 8 (4096 + 1024)).
    assert count(rank=8, targets=("*/q_proj/kernel", "*/v_proj/kernel")) == 3_407_872
    # DoRA adds an output's length each: 32 (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096).
    assert count(rank=1, variant="dora") == 2_621_440 + 1_376_256
    # VeRA: a d of 256 for each of 7 weights and a b for each output.
    assert count(rank=256, variant="vera") == 32 * 7 * 256 + 1_376_256
