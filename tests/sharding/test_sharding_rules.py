"""The table of rules on plain, adapted and quantised trees; nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import lorax
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig
from lorax.sharding import ZOO, follow, kept_whole, roles_of, shard, shardings, specs
from lorax.tree import named_leaves, train_last

CONFIG = ModelConfig("qwen3", 96, 1024, 2048, 3, 8, 8, 128, tie_embeddings=False, attention_bias=True, qk_norm=True)
BOTH = AbstractMesh((2, 4), ("data", "model"))
IDS = (jax.ShapeDtypeStruct((1, 4), jnp.int32),)


def adapted(platform=None, **options):
    model = Model.abstract(CONFIG, jnp.bfloat16)
    params = model.params
    if platform:
        params = lorax.quantize(params, fn=model.apply, args=IDS, platform=platform, **options)
    return lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(rank=3), fn=model.apply, args=IDS)


def is_spec(x):
    return isinstance(x, P)


def test_the_zoo_under_fsdp_tensor_parallelism_and_both():
    params = Model.abstract(CONFIG).params
    columns, rows = ("attn", "q_proj"), ("mlp", "down_proj")
    for mesh, fsdp, tensor in (
        (AbstractMesh((8,), ("data",)), "data", None),
        (AbstractMesh((8,), ("model",)), None, "model"),
        (BOTH, "data", "model"),
        (AbstractMesh((2, 2, 2), ("replica", "fsdp", "tensor")), "fsdp", "tensor"),
    ):
        tree = specs(params, mesh)
        layers = tree["layers"]
        assert layers[columns[0]][columns[1]]["kernel"] == P(None, fsdp, tensor)
        assert layers[rows[0]][rows[1]]["kernel"] == P(None, tensor, fsdp)
        assert layers["attn"]["q_proj"]["bias"] == P(None, tensor)
        assert tree["embed"]["embedding"] == P(tensor, fsdp)
        assert tree["lm_head"]["kernel"] == P(fsdp, tensor)
        assert not any(layers["attn"]["q_norm"]["scale"])
        # The axis of scanned layers is whole everywhere.
        assert all(spec == P() or spec[0] is None for spec in jax.tree.leaves(layers, is_leaf=is_spec))


def test_roles_may_be_given_and_left_out():
    names = ("data", "model")
    assert roles_of(names, {"fsdp": None})["fsdp"] is None
    turned = {"fsdp": "model", "tensor": None, "expert": None, "adapter": "model"}
    assert roles_of(names, {"fsdp": "model", "tensor": None}) == turned
    assert roles_of(names, {"adapter": None})["adapter"] is None
    assert roles_of((*names, "adapter"))["adapter"] == "adapter"
    with pytest.raises(LoraxError, match="no axis 'rows'"):
        roles_of(names, {"fsdp": "rows"})
    with pytest.raises(LoraxError, match="role 'fast'"):
        roles_of(names, {"fast": "data"})


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
def test_factors_follow_their_weight_and_the_rank_is_whole(platform):
    tree = specs(adapted(platform), BOTH)["layers"]
    q, down = tree["attn"]["q_proj"]["kernel"], tree["mlp"]["down_proj"]["kernel"]
    assert (P(None, "data", None), P(None, None, "model")) == (q.A, q.B)
    assert (P(None, "model", None), P(None, None, "data")) == (down.A, down.B)
    if platform:
        codes = {"cpu": P(None, "model", "data"), "tpu": P(None, "data", "model")}[platform]
        assert q.base.array.codes == codes
        assert q.base.array.scales == P(None, "model", "data")
        assert q.base.array.scales2 == P(None)


@pytest.mark.parametrize("variant", ["dora", "lora-fa", "vera"])
def test_variants_lie_as_their_weight_does(variant):
    model = Model.abstract(CONFIG, jnp.bfloat16)
    spec = lorax.LoraSpec(rank=3, variant=variant)
    params = lorax.adapt(jax.random.key(0), model.params, spec, fn=model.apply, args=IDS)
    tree = specs(params, BOTH)["layers"]
    q, down = tree["attn"]["q_proj"]["kernel"], tree["mlp"]["down_proj"]["kernel"]
    if variant == "vera":
        assert (q.A, q.B, q.d, q.b) == (P("data", None), P(None, "model"), P(None, None), P(None, "model"))
        assert (down.A, down.b) == (P("model", None), P(None, "data"))
    else:
        assert (P(None, "data", None), P(None, None, "model")) == (q.A, q.B)
        assert (P(None, "model", None), P(None, None, "data")) == (down.A, down.B)
    if variant == "dora":
        assert (q.magnitude, down.magnitude) == (P(None, "model"), P(None, "data"))
        assert q.weight.base == P(None, "data", "model")
    for half in lorax.split(params):
        assert jax.tree.structure(specs(half, BOTH), is_leaf=is_spec) == jax.tree.structure(half)
    trainable = lorax.split(params)[0]
    # Moments follow: every array that trains is split wherever its weight is.
    state = jax.eval_shape(optax.adam(1e-3).init, trainable)
    places = follow(state, trainable, shardings(trainable, BOTH), BOTH)
    want = [s.spec for s in jax.tree.leaves(shardings(trainable, BOTH))]
    assert [s.spec for s in jax.tree.leaves(places[0].mu)] == want


def test_a_bank_is_split_over_its_adapters_or_as_its_weight():
    model = Model.abstract(CONFIG, jnp.bfloat16)
    one = lorax.adapt(jax.random.key(0), model.params, lorax.LoraSpec(rank=3), fn=model.apply, args=IDS)
    bank = lambda count: lorax.attach(  # noqa: E731
        model.params, jax.eval_shape(lambda a: lorax.stack([a] * count), lorax.extract(one))
    )
    even, odd = (specs(bank(count), BOTH)["layers"]["attn"] for count in (4, 3))
    assert (P(None, "data", None), P(None, "data", "model")) == (even["q_proj"]["kernel"].A, even["q_proj"]["kernel"].B)
    assert (P(None, "data", "model"), P(None, "data", None)) == (even["o_proj"]["kernel"].A, even["o_proj"]["kernel"].B)
    # Nine rows do not divide into two parts: features are split instead.
    assert (P(None, None, "data"), P(None, None, "model")) == (odd["q_proj"]["kernel"].A, odd["q_proj"]["kernel"].B)
    own = specs(bank(4), AbstractMesh((2, 2, 2), ("data", "model", "adapter")))["layers"]["attn"]["q_proj"]["kernel"]
    assert (P(None, "adapter", "data"), P(None, "adapter", "model")) == (own.A, own.B)
    placed = shard(bank(4), BOTH)["layers"]["attn"]["q_proj"]["kernel"]
    assert placed.placement.core == (None, "model")
    assert placed.placement.rows == ("data",)


def test_quantised_weights_are_split_by_whole_blocks():
    assert kept_whole(adapted("cpu"), BOTH) == {} == kept_whole(adapted("tpu"), BOTH)
    # 1024 inputs over 32: half a block each. 1024 outputs over 32: a quarter of a TPU's tile.
    many = AbstractMesh((32,), ("model",))
    rows, words = (kept_whole(adapted(platform), many) for platform in ("cpu", "tpu"))
    assert "whole blocks of 64 on model" in rows["layers/attn/o_proj/kernel"]
    assert "layers/attn/q_proj/kernel" not in rows
    assert "whole blocks of 128 on model" in words["layers/attn/q_proj/kernel"]
    tree = specs(adapted("tpu"), many)["layers"]["attn"]["o_proj"]["kernel"]
    assert tree.base.array.codes == P(None, None, None)
    assert tuple(tree.A) == (None, "model", None), "the factors are split all the same"
    many = kept_whole(adapted("cpu", block_size=256), AbstractMesh((8,), ("data",)))
    assert "layers/attn/q_proj/kernel" in many


def test_blocks_that_cross_rows_stay_whole():
    params = {"up_proj": {"kernel": jax.ShapeDtypeStruct((40, 24), jnp.float32)}}
    packed = lorax.quantize(params, targets="*kernel")
    assert "whole blocks" in kept_whole(packed, BOTH)["up_proj/kernel"]
    assert specs(packed, BOTH)["up_proj"]["kernel"].array.codes == P(None)


def test_halves_of_split_and_pieces():
    params = adapted("cpu")
    for half in lorax.split(params):
        assert jax.tree.structure(specs(half, BOTH), is_leaf=is_spec) == jax.tree.structure(half)
    pieces = train_last({"up_proj": {"kernel": jnp.zeros((3, 8, 16))}}, 1, "*")
    for tree in (pieces, *lorax.split(pieces)):
        placed = specs(tree, BOTH)
        assert jax.tree.structure(placed, is_leaf=is_spec) == jax.tree.structure(tree)
    assert specs(pieces, BOTH)["up_proj"]["kernel"].parts[1].value == P(None, "data", "model")


def test_a_tree_of_ones_own():
    tree = {
        "tower": {"wi": jax.ShapeDtypeStruct((16, 8, 4), jnp.float32), "gain": jax.ShapeDtypeStruct((8,), jnp.float32)},
        "experts": {"up_proj": {"kernel": jax.ShapeDtypeStruct((3, 8, 64, 32), jnp.float32)}},
    }
    mesh = AbstractMesh((2, 2, 2), ("data", "model", "expert"))
    with pytest.raises(LoraxError, match=r"tower/(gain|wi): no rule"):
        specs(tree, mesh)
    mine = (("*/wi", ("fsdp", "tensor", None)), ("*/gain", ()), *ZOO)
    placed = specs(tree, mesh, mine)
    assert placed["tower"]["wi"] == P("data", "model", None)
    assert placed["experts"]["up_proj"]["kernel"] == P(None, "expert", "data", "model")
    with pytest.raises(LoraxError, match="has 1 axes"):
        specs(tree, mesh, (("*", ("fsdp", "tensor")),))


def test_moments_lie_with_their_weights():
    params = {"o_proj": {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}}
    mesh = jax.make_mesh((8,), ("model",))
    state = optax.adamw(1e-3).init(params)
    places = follow({"opt": state, "key": jnp.zeros(2)}, params, shardings(params, mesh), mesh)
    assert places["opt"][0].mu["o_proj"]["kernel"].spec == P("model", None)
    assert places["opt"][0].nu["o_proj"]["bias"].spec == P(None)
    assert places["opt"][0].count.spec == P() == places["key"].spec


def test_shard_moves_arrays_and_tells_quantised_weights():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = {"up_proj": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(128, 64)), jnp.float32)}}
    placed = shard(lorax.quantize(params, targets="*kernel"), mesh)["up_proj"]["kernel"]
    assert placed.array.codes.sharding.spec == P("model", "data")
    assert placed.array.placement.core == ("model", "data")
    assert placed.array.placement.rows == ("data",)
    plain = lorax.quantize(params, targets="*kernel")["up_proj"]["kernel"]
    np.testing.assert_array_equal(placed.dense(), plain.dense())
    assert [path for path, _ in named_leaves({"a": placed})] == ["a"]
