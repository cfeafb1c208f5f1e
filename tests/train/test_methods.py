"""Four methods, one loop: what trains, what moves, and what stays to the last bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.errors import LoraxError
from lorax.models.config import ModelConfig
from lorax.models.model import Model
from lorax.train import (
    TrainConfig,
    adapted,
    coverage,
    evaluate,
    fit,
    init_state,
    language_model_loss,
    make_optimizer,
    make_scorer,
    make_step,
)
from lorax.train.methods import head_trains
from lorax.train.receipts import unmoved

VOCAB = 101
CONFIG = ModelConfig("llama", VOCAB, 16, 24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True)


@functools.cache
def base_model():
    return Model.init(CONFIG, jax.random.key(0))


@pytest.fixture
def model():
    return base_model()


def batches(rows=4, width=13, seed=0):
    rng = np.random.default_rng(seed)
    while True:
        ids = rng.integers(0, VOCAB, (rows, width)).astype(np.int32)
        ids[:, -3:] = 7
        yield {
            "ids": ids,
            "targets": np.roll(ids, -1, axis=1),
            "weights": np.pad(np.ones((rows, 3), np.float32), [(0, 0), (width - 4, 1)]),
            "positions": np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
            "segment_ids": np.ones((rows, width), np.int32),
        }


def settings(method, **kwargs):
    return TrainConfig(task="medical", method=method, rank=3, lr=1e-2, last_k=2, **kwargs)


@functools.cache
def trained(method, steps=6, **kwargs):
    """A short run of a method: (model, state, parameters, rows). Each is trained once for all tests."""
    config = settings(method, **kwargs)
    model, params = adapted(base_model(), config)
    trainable, frozen = lorax.split(params)
    tx, rate = make_optimizer(config, steps)
    loss = language_model_loss(model, head_trains=head_trains(trainable, model.config))
    rows = []
    state = fit(
        make_step(loss, tx),
        init_state(trainable, tx, 0),
        frozen,
        batches(),
        steps=steps,
        rate=rate,
        after=lambda _, row: rows.append(row),
    )
    return model, state, lorax.join(state.trainable, frozen), rows


def changed(before, after):
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(before)]
    same = [bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    return {name for name, equal in zip(names, same, strict=True) if not equal}


@pytest.mark.parametrize("method", ["lora", "full", "head", "last-k"])
def test_loss_falls_and_every_target_moved(method):
    trained_model, state, params, rows = trained(method)
    assert rows[-1].loss < rows[0].loss - 0.02
    assert unmoved(coverage(state)) is None
    plain = lorax.merge(params)
    held_out = list(itertools.islice(batches(seed=9), 2))
    scorer = make_scorer(trained_model)
    one, two = evaluate(scorer, params, held_out), evaluate(scorer, plain, held_out)
    assert one.items == 8
    assert one.tokens == 24
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)


def test_what_may_not_change_does_not(model):
    base = model.params
    attention = [f"layers/attn/{x}_proj/kernel" for x in "qkvo"]
    linear = {*attention, *(f"layers/mlp/{x}_proj/kernel" for x in ("gate", "up", "down"))}
    _, _, params, _ = trained("lora")
    assert changed(base, lorax.merge(params)) == linear
    _, _, params, _ = trained("head")
    merged = lorax.merge(params)
    head = merged.pop("lm_head")["kernel"]
    assert changed(base, merged) == set()
    assert not np.array_equal(head, base["embed"]["embedding"].T)
    _, _, params, _ = trained("last-k")
    merged = lorax.merge(params)
    assert changed(base, merged) == linear | {"layers/attn_norm/scale", "layers/mlp_norm/scale"}
    for name in ("q_proj", "o_proj"):
        np.testing.assert_array_equal(
            merged["layers"]["attn"][name]["kernel"][0], base["layers"]["attn"][name]["kernel"][0]
        )
    _, _, params, _ = trained("full")
    assert changed(base, lorax.merge(params)) == linear | {
        "layers/attn_norm/scale", "layers/mlp_norm/scale", "norm/scale", "embed/embedding",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full", "head", "last-k"])
def test_the_base_is_untouched_and_the_start_is_the_base(model, method):
    trained(method)  # donates buffers, none of them the base's
    fresh = Model.init(CONFIG, jax.random.key(0))
    assert changed(fresh.params, model.params) == set()
    ids = jnp.asarray(next(batches())["ids"])
    ready, params = adapted(model, settings(method))
    want = model.apply(model.params, ids)
    np.testing.assert_allclose(lorax.lift(ready.apply)(params, ids), want, rtol=1e-5, atol=1e-6)


def test_both_ways_to_differentiate_the_loss_agree(model):
    _, params = adapted(model, settings("lora"))
    trainable, frozen = lorax.split(params)
    trainable = jax.tree.map(lambda x: x + 0.01, trainable)  # B away from zero: a zero B hides A's gradient
    batch = next(batches())
    grads = [
        jax.grad(lambda t, trains=trains: language_model_loss(model, head_trains=trains)(t, frozen, batch, None)[0])(
            trainable
        )
        for trains in (True, False)
    ]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_an_adapter_on_the_head_trains():
    _, state, _, rows = trained("lora", targets=("embed/embedding",))
    assert head_trains(state.trainable, CONFIG)
    assert rows[-1].loss < rows[0].loss
    assert unmoved(coverage(state)) is None


def test_accumulated_micro_batches_train_like_one(model):
    config = settings("lora")
    _, params = adapted(model, config)
    trainable, frozen = lorax.split(params)
    tx, rate = make_optimizer(config, 2)
    step = make_step(language_model_loss(model, head_trains=False), tx)
    whole = list(itertools.islice(batches(rows=6), 2))
    for batch in whole:
        batch["weights"][:2] = 0  # the first micro-batch counts less than the others
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for batch in whole for i in (0, 2, 4)]
    one = fit(step, init_state(trainable, tx, 0), frozen, iter(whole), steps=2, rate=rate)
    three = fit(step, init_state(trainable, tx, 0), frozen, iter(parts), steps=2, rate=rate, accumulate=3)
    for a, b in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(three.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (settings("lora", targets=("layers/attn/w_proj/*",)), "w_proj"),
        (TrainConfig(task="medical", rank=1000), "rank 1000"),
        (TrainConfig(task="medical", method="last-k", last_k=4), "4"),
    ],
)
def test_what_cannot_be_adapted_is_refused(model, config, says):
    with pytest.raises(LoraxError, match=says):
        adapted(model, config)
