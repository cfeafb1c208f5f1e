"""adapt: which weights, which axes, which start; in Linen, NNX and plain trees, concrete and abstract."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lorax
from lorax import Axes, LoraSpec, LoraxError
from lorax.tree import named_leaves, train_last

KEY = jax.random.key(0)
IDS = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(7, name="down")(nn.gelu(nn.Dense(11, name="up")(x)))


class Model(nn.Module):
    """Scanned and rematerialised blocks, attention, a norm, a tied embedding: what real Linen code looks like."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(13, 7, name="embed")
        blocks = nn.scan(
            lambda m, c, _: (m(c), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(nn.remat(Block)(name="blocks"), embed(ids), None)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=7, name="attn")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


LINEN = Model()
PARAMS = LINEN.init(KEY, IDS)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.up = nnx.Linear(3, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 6, 8, rngs=rngs, decode=False)

    def __call__(self, ids):
        return self.attn(self.conv(self.up(self.embed(ids))))


def axes_of(tree):
    return {path: leaf.axes for path, leaf in named_leaves(tree) if isinstance(leaf, lorax.LowRank)}


def moved(adapted):
    trainable, frozen = lorax.split(adapted)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return lorax.join(jax.tree.unflatten(treedef, leaves), frozen)


def assert_lifts(fn, adapted, *args):
    adapted = moved(adapted)
    got, want = lorax.lift(fn)(adapted, *args), fn(lorax.merge(adapted), *args)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()), rtol=1e-5)


def test_roles_of_a_linen_model_come_from_its_trace():
    adapted = lorax.adapt(KEY, PARAMS, LoraSpec(rank=2), fn=LINEN.apply, args=(IDS,))
    assert axes_of(adapted) == {
        "params/attn/key/kernel": Axes((), (0,), (1, 2)),
        "params/attn/out/kernel": Axes((), (0, 1), (2,)),
        "params/attn/query/kernel": Axes((), (0,), (1, 2)),
        "params/attn/value/kernel": Axes((), (0,), (1, 2)),
        "params/blocks/down/kernel": Axes((0,), (1,), (2,)),
        "params/blocks/up/kernel": Axes((0,), (1,), (2,)),
    }
    up = adapted["params"]["blocks"]["up"]["kernel"]
    assert (up.A.shape, up.B.shape) == ((3, 7, 2), (3, 2, 11))
    assert float(jnp.abs(up.A[0] - up.A[1]).max()) > 0.1, "each layer has factors of its own"
    assert_lifts(LINEN.apply, adapted, IDS)


def test_every_matrix_of_a_linen_model_the_tied_embedding_too():
    spec = LoraSpec(targets=("*embedding", "*kernel"), rank=2, train_also="*norm*")
    adapted = lorax.adapt(KEY, PARAMS, spec, fn=LINEN.apply, args=(IDS,))
    assert axes_of(adapted)["params/embed/embedding"] == Axes((), (0,), (1,))
    assert isinstance(adapted["params"]["norm"]["scale"], lorax.Full)
    assert_lifts(LINEN.apply, adapted, IDS)


def test_nnx_state_goes_through_split_and_merge():
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda state, ids: nnx.merge(graphdef, state, rest)(ids)  # noqa: E731
    ids = jnp.array([[0, 1, 4, 2]], jnp.int32)
    adapted = lorax.adapt(KEY, params, LoraSpec(rank=2), fn=fn, args=(ids,))
    assert axes_of(adapted)["conv/kernel"] == Axes((), (0, 1), (2,))
    assert set(axes_of(adapted)) == {f"attn/{x}/kernel" for x in ("key", "out", "query", "value")} | {
        "conv/kernel",
        "up/kernel",
    }
    assert_lifts(fn, adapted, ids)


def test_it_starts_at_the_base_to_the_last_bit():
    fn = lambda p, x: jnp.tanh(jnp.take(p["e"], x, axis=0) @ p["w"]) @ p["e"].T  # noqa: E731
    rng = np.random.default_rng(0)
    params = {
        "e": jnp.asarray(rng.normal(size=(13, 7)), jnp.float32),
        "w": jnp.asarray(rng.normal(size=(7, 7)), jnp.float32),
    }
    adapted = lorax.adapt(KEY, params, LoraSpec(targets="*", rank=3), fn=fn, args=(IDS,))
    np.testing.assert_array_equal(lorax.lift(fn)(adapted, IDS), fn(params, IDS))


def test_without_fn_the_last_two_axes_are_the_matrix():
    params = {
        "layers": {"q": {"kernel": jnp.ones((4, 5, 6))}, "norm": {"scale": jnp.ones((4, 5))}},
        "lm_head": {"kernel": jnp.ones((6, 9))},
    }
    assert axes_of(lorax.adapt(KEY, params, LoraSpec(rank=2))) == {"layers/q/kernel": Axes((0,), (1,), (2,))}


def test_experts_by_index_and_embeddings_are_told_apart():
    params = {"experts": jnp.ones((4, 3, 5)), "table": jnp.ones((9, 3))}

    def fn(p, ids):
        return jnp.einsum("bd,bdf->bf", p["table"][ids], p["experts"][ids % 4])

    spec = LoraSpec(targets="*", rank=2)
    adapted = lorax.adapt(KEY, params, spec, fn=fn, args=(jnp.arange(6),))
    assert axes_of(adapted) == {"experts": Axes((0,), (1,), (2,)), "table": Axes((), (0,), (1,))}
    assert_lifts(fn, adapted, jnp.arange(6))
    # "all-linear" leaves the embedding out.
    assert set(axes_of(lorax.adapt(KEY, params, LoraSpec(rank=2), fn=fn, args=(jnp.arange(6),)))) == {"experts"}


def test_unrolled_layers_by_index_are_stacked():
    params = {"w": jnp.ones((4, 5, 5))}
    fn = lambda p, x: x @ p["w"][0] @ jax.lax.dynamic_index_in_dim(p["w"], 3, 0, False)  # noqa: E731
    adapted = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=2), fn=fn, args=(jnp.ones((2, 5)),))
    assert axes_of(adapted) == {"w": Axes((0,), (1,), (2,))}
    assert_lifts(fn, adapted, jnp.ones((2, 5)))


def test_abstract_trees_stay_abstract():
    shapes = jax.eval_shape(LINEN.init, KEY, IDS)
    adapted = lorax.adapt(
        KEY, shapes, LoraSpec(rank=2), fn=LINEN.apply, args=(jax.ShapeDtypeStruct((2, 3), jnp.int32),)
    )
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapted))
    assert (
        lorax.report(adapted).trainable
        == lorax.report(lorax.adapt(KEY, PARAMS, LoraSpec(rank=2), fn=LINEN.apply, args=(IDS,))).trainable
    )


def test_a_weights_start_depends_on_its_path_and_key_alone():
    params = {"a": {"kernel": jnp.ones((5, 7))}, "b": {"kernel": jnp.ones((5, 7))}}
    both = lorax.adapt(KEY, params, LoraSpec(targets="*", rank=2))
    one = lorax.adapt(KEY, params, LoraSpec(targets="b/*", rank=2))
    np.testing.assert_array_equal(both["b"]["kernel"].A, one["b"]["kernel"].A)
    assert not np.array_equal(both["a"]["kernel"].A, both["b"]["kernel"].A)
    other = lorax.adapt(jax.random.key(1), params, LoraSpec(targets="*", rank=2))
    assert not np.array_equal(both["a"]["kernel"].A, other["a"]["kernel"].A)


def test_initial_widths():
    params = {"w": jnp.zeros((400, 300))}
    gaussian = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=50))["w"].A
    assert float(gaussian.std()) == pytest.approx(1 / 20, rel=0.05)
    uniform = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=50, init="uniform"))["w"].A
    assert float(jnp.abs(uniform).max()) <= 1 / 20
    assert float(uniform.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_factors_are_float32_over_a_bfloat16_base_and_scales_follow_the_spec():
    params = {"w": jnp.ones((9, 9), jnp.bfloat16)}
    leaf = lorax.adapt(KEY, params, LoraSpec(targets="w", rank=4, alpha=8.0, scaling="rslora"))["w"]
    assert (leaf.A.dtype, leaf.B.dtype, leaf.base.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    assert float(leaf.scale) == 4.0
    assert lorax.merge({"w": leaf})["w"].dtype == jnp.bfloat16


def test_patterns_glob_regex_callable_and_ranks_by_pattern():
    spec = LoraSpec(
        targets=(re.compile(r"params/attn/(query|value)/kernel"), lambda path, leaf: leaf.shape == (3, 7, 11)),
        rank={"*query*": 1, "*": 3},
        alpha={"*query*": 4, "*": 6},
    )
    adapted = lorax.adapt(KEY, PARAMS, spec, fn=LINEN.apply, args=(IDS,))
    leaves = {p: (leaf.rank, float(leaf.scale)) for p, leaf in named_leaves(adapted) if isinstance(leaf, lorax.LowRank)}
    assert leaves == {
        "params/attn/query/kernel": (1, 4.0),
        "params/attn/value/kernel": (3, 2.0),
        "params/blocks/up/kernel": (3, 2.0),
    }


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"targets": "*/qery/*"}, "params/attn/query/kernel"),
        ({"targets": "kernel"}, "write '*kernel*'"),
        ({"targets": "*kernel", "train_also": "*/nrm/*"}, "train_also: '*/nrm/*' matches no weight"),
        ({"targets": "*/norm/scale", "rank": 1}, "params/norm/scale: no matmul"),
        ({"targets": "*up/kernel", "rank": 12}, "params/blocks/up/kernel: rank 12 is above min(in, out) = 7"),
        ({"targets": "*up/kernel", "rank": {"*down*": 2}}, "params/blocks/up/kernel: no entry of rank"),
        ({"targets": ()}, "nothing to train"),
        ({"targets": ("all-linear", "*up*")}, "give it alone"),
    ],
)
def test_errors_name_the_weight_and_the_way_out(spec, says):
    with pytest.raises(LoraxError) as caught:
        lorax.adapt(KEY, PARAMS, LoraSpec(**spec), fn=LINEN.apply, args=(IDS,))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"rank": True}, {"rank": {"*": 0}}, {"alpha": float("nan")},
        {"alpha": "x"}, {"scaling": "big"}, {"variant": "dora2"}, {"init": "ones"}, {"dropout": 1.0},
        {"dropout": -0.1}, {"dropout": True},
        {"dtype": jnp.int32},
    ],
)  # fmt: skip
def test_specs_refuse_what_makes_no_sense(bad):
    with pytest.raises(LoraxError, match=next(iter(bad))):
        LoraSpec(**bad)


def test_adapting_twice_integers_and_vectors_are_errors():
    adapted = lorax.adapt(KEY, {"w": jnp.ones((3, 5))}, LoraSpec(targets="w", rank=1))
    with pytest.raises(LoraxError, match="w: is adapted already"):
        lorax.adapt(KEY, adapted, LoraSpec(targets="w", rank=1))
    with pytest.raises(LoraxError, match="w: has dtype int32"):
        lorax.adapt(KEY, {"w": jnp.ones((3, 5), jnp.int32)}, LoraSpec(targets="w", rank=1))
    with pytest.raises(LoraxError, match="w: has shape"):
        lorax.adapt(KEY, {"w": jnp.ones(5)}, LoraSpec(targets="w", rank=1))


def test_uses_that_contradict_each_other_are_an_error():
    params = {"w": jnp.ones((4, 4, 4))}
    fn = lambda p, x: jnp.einsum("a,abc->bc", x, p["w"]) + jnp.einsum("ab,abc->c", jnp.ones((4, 4)), p["w"])  # noqa: E731
    with pytest.raises(LoraxError, match="w: its uses contradict each other"):
        lorax.adapt(KEY, params, LoraSpec(targets="w", rank=2), fn=fn, args=(jnp.ones(4),))


def test_train_last_refuses_nonsense():
    params = {"layers": {"a": jnp.ones((4, 3)), "b": jnp.ones((5, 3))}}
    with pytest.raises(LoraxError, match="not stacked over the same layers"):
        train_last(params, 1)
    for k in (0, 5, True):
        with pytest.raises(LoraxError, match="from 1 to the 4 layers"):
            train_last({"layers": {"a": jnp.ones((4, 3))}}, k)
