"""The zoo's decoders through adapt and lift: counts that the literature gives, and equality with the merged weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.models import Model, ModelConfig
from lorax.tree import train_last

SMOLLM2 = ModelConfig(
    "llama", 49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True
)
LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
TINY = {
    "llama": ModelConfig("llama", 37, 24, 20, 3, 6, 2, 4, tie_embeddings=True),
    "qwen2": ModelConfig("qwen2", 37, 24, 20, 3, 6, 2, 4, attention_bias=True),
    "qwen3": ModelConfig("qwen3", 37, 24, 20, 3, 6, 2, 6, qk_norm=True),
}
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 36]], jnp.int32)
ABSTRACT_IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def trained(params, scale=0.3):
    """The tree after some imaginary training: every trainable array moved, B non-zero."""
    trainable, frozen = lorax.split(params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return lorax.join(jax.tree.unflatten(treedef, moved), frozen)


def count(model, targets, rank, with_fn):
    more = {"fn": model.apply, "args": (ABSTRACT_IDS,)} if with_fn else {}
    spec = lorax.LoraSpec(targets=targets, rank=rank)
    return lorax.report(lorax.adapt(jax.random.key(0), model.params, spec, **more)).trainable


@pytest.mark.parametrize(("rank", "with_fn"), [(1, False), (3, True), (16, False)])
def test_counts_of_smollm2(rank, with_fn):
    model = Model.abstract(SMOLLM2)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(model.params)) == 134_515_008
    assert count(model, "all-linear", rank, with_fn) == 305_280 * rank
    assert count(model, ("*/q_proj/kernel", "*/v_proj/kernel"), rank, with_fn) == 57_600 * rank


def test_count_of_llama_8b():
    # 8.0 billion parameters as shapes: a rank-1 change of all linear weights has 2,621,440.
    assert count(Model.abstract(LLAMA_8B), "all-linear", 1, True) == 2_621_440


@pytest.mark.parametrize("family", TINY)
def test_lifted_decoder_equals_merged(family):
    model = Model.init(TINY[family], jax.random.key(0))
    spec = lorax.LoraSpec(rank=3)
    adapted = lorax.adapt(jax.random.key(1), model.params, spec, fn=model.apply, args=(IDS,))
    # XLA compiles the body of a scan, and contracts it otherwise with the change in it: equal up to the last bits.
    at_start, base = lorax.lift(model.apply)(adapted, IDS), model.apply(model.params, IDS)
    np.testing.assert_allclose(at_start, base, rtol=1e-5, atol=1e-6 * float(jnp.abs(base).max()))
    adapted = trained(adapted)
    got = lorax.lift(model.apply)(adapted, IDS)
    want = model.apply(lorax.merge(adapted), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    assert float(jnp.abs(want - model.apply(model.params, IDS)).max()) > 1e-3


def test_tied_embedding_has_one_factor_pair_for_both_uses():
    model = Model.init(TINY["llama"], jax.random.key(0))
    spec = lorax.LoraSpec(targets="embed/embedding", rank=2)
    adapted = trained(lorax.adapt(jax.random.key(1), model.params, spec, fn=model.apply, args=(IDS,)))
    leaf = adapted["embed"]["embedding"]
    assert (leaf.A.shape, leaf.B.shape) == ((37, 2), (2, 24))
    got, want = lorax.lift(model.apply)(adapted, IDS), model.apply(lorax.merge(adapted), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


def test_the_last_layers_alone():
    model = Model.init(TINY["llama"], jax.random.key(0))
    adapted = train_last(model.params, 1)
    np.testing.assert_allclose(
        lorax.lift(model.apply)(adapted, IDS), model.apply(model.params, IDS), rtol=1e-6, atol=1e-7
    )
    trainable, frozen = lorax.split(adapted)

    def loss(t):
        return jnp.sum(jnp.sin(lorax.lift(model.apply)(lorax.join(t, frozen), IDS)))

    def plain(p):
        return jnp.sum(jnp.sin(model.apply(p, IDS)))

    got = jax.grad(loss)(trainable)["layers"]["mlp"]["up_proj"]["kernel"].parts[1].value
    want = jax.grad(plain)(model.params)["layers"]["mlp"]["up_proj"]["kernel"][2:]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_layers_below_the_first_trained_one_have_no_backward_pass():
    deep = ModelConfig("llama", 37, 24, 20, 8, 6, 2, 4, tie_embeddings=True)
    model = Model.init(deep, jax.random.key(0))

    def backward_scans(params):
        trainable, frozen = lorax.split(params)
        loss = lambda t: jnp.sum(lorax.lift(model.hidden)(lorax.join(t, frozen), IDS))  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
        return sorted(int(line.split("=")[1]) for line in text.splitlines() if line.strip().startswith("length="))

    # The lower six layers run once, forward; the upper two forward and backward.
    assert backward_scans(train_last(model.params, 2)) == [2, 2, 6]
    assert backward_scans(train_last(model.params, 8)) == [8, 8]
