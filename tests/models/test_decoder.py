"""The decoder against itself: packing, padding, caching, remat, dtypes, abstract trees, and under `lift`."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig, RopeScaling
from lorax.models.attention import attend, attend_in_blocks, visible

PLAIN = ModelConfig("llama", 59, 18, 31, num_layers=3, num_heads=3, num_kv_heads=3, head_dim=6)
EVERYTHING = ModelConfig(
    "qwen3",
    61,
    20,
    33,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=14,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    tie_embeddings=True,
    attention_bias=True,
    qk_norm=True,
    sliding_window=5,
)
BOTH = pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])


def random_model(config, dtype=jnp.float32, **options):
    """A model with every parameter drawn, biases and norms too, wide enough that attention is not uniform."""
    model, rng = Model.abstract(config, dtype, **options), np.random.default_rng(1)

    def draw(path, x):
        near = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(near + 0.3 * rng.normal(size=x.shape), dtype)

    return dataclasses.replace(model, params=jax.tree.map_with_path(draw, model.params))


def random_ids(config, rows, tokens, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (rows, tokens)), jnp.int32)


def apply(model, *args, **kwargs):
    """One program and not one for each operation: compiling is what these tests spend their time on."""
    return jax.jit(model.apply)(model.params, *args, **kwargs)


def decode(model, *args):
    return jax.jit(model.decode)(model.params, *args)


@BOTH
def test_reading_in_chunks_with_a_cache_equals_reading_at_once(config):
    model, ids = random_model(config), random_ids(config, 2, 13)
    whole = apply(model, ids)
    cache, parts = model.init_cache(2, 16), []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 13)):
        logits, cache = decode(model, ids[:, start:stop], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_to_a_cache(config, side):
    model = random_model(config)
    lengths, width = (7, 3), 9
    prompts = [random_ids(config, 1, n, seed=n)[0] for n in lengths]
    ids, real = np.full((2, width), 5, np.int32), np.zeros((2, width), bool)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, at], real[row, at] = prompt, True
    first, cache = decode(model, jnp.array(ids), model.init_cache(2, 12), jnp.array(real))
    follow = jnp.array([[4, 8, 15], [16, 23, 42]])
    second, cache = decode(model, follow, cache)
    assert cache.next.tolist() == [10, 6]
    for row, prompt in enumerate(prompts):
        alone = apply(model, jnp.concatenate([prompt, follow[row]])[None])[0]
        np.testing.assert_allclose(first[row][real[row]], alone[: len(prompt)], atol=1e-5)
        np.testing.assert_allclose(second[row], alone[len(prompt) :], atol=1e-5)


@BOTH
@pytest.mark.parametrize("given", [True, False])
def test_packed_documents_do_not_see_each_other(config, given):
    model = random_model(config)
    a, b = random_ids(config, 1, 6, seed=1), random_ids(config, 1, 5, seed=2)
    filler = jnp.full((1, 2), 3)
    packed = jnp.concatenate([a, b, filler], axis=1)
    segments = jnp.array([[1] * 6 + [2] * 5 + [0] * 2])
    positions = jnp.array([[*range(6), *range(5), 0, 1]]) if given else None
    out = apply(model, packed, positions, segments)
    np.testing.assert_allclose(out[:, :6], apply(model, a), atol=1e-5)
    np.testing.assert_allclose(out[:, 6:11], apply(model, b), atol=1e-5)
    assert np.isfinite(out).all()


@BOTH
def test_padding_does_not_leak_from_either_side(config):
    model, ids = random_model(config), random_ids(config, 1, 5)
    alone = apply(model, ids)
    left = jnp.concatenate([jnp.full((1, 4), 7), ids], axis=1)
    right = jnp.concatenate([ids, jnp.full((1, 4), 7)], axis=1)
    on_left = apply(model, left, segment_ids=jnp.array([[0] * 4 + [1] * 5]))
    on_right = apply(model, right, segment_ids=jnp.array([[1] * 5 + [0] * 4]))
    np.testing.assert_allclose(on_left[:, 4:], alone, atol=1e-5)
    np.testing.assert_allclose(on_right[:, :5], alone, atol=1e-5)


def test_only_distance_matters_and_the_future_does_not():
    model, ids = random_model(EVERYTHING), random_ids(EVERYTHING, 2, 9)
    base = apply(model, ids)
    shifted = apply(model, ids, jnp.arange(9)[None] + 5)
    np.testing.assert_allclose(shifted, base, atol=1e-4)
    changed = apply(model, ids.at[:, 6].set((ids[:, 6] + 1) % 61))
    np.testing.assert_allclose(changed[:, :6], base[:, :6], atol=1e-6)
    assert np.abs(changed[:, 6:] - base[:, 6:]).max() > 1e-3


def test_a_window_hides_what_lies_further_back():
    # One layer, since each layer passes on what it saw: a window w and L layers reach back L (w - 1) tokens.
    config = dataclasses.replace(EVERYTHING, num_layers=1, sliding_window=3)
    model, ids = random_model(config), random_ids(config, 1, 8)
    base, changed = (apply(model, x) for x in (ids, ids.at[0, 2].add(1)))
    np.testing.assert_allclose(changed[0, 5:], base[0, 5:], atol=1e-6)
    assert np.abs(changed[0, 4] - base[0, 4]).max() > 1e-3


@BOTH
def test_remat_changes_no_gradient(config):
    model, ids = random_model(config), random_ids(config, 2, 7)
    thrifty = dataclasses.replace(model, remat=True)
    grads = [
        jax.jit(jax.grad(lambda p, m=m: jnp.sum(jax.nn.log_softmax(m.apply(p, ids))[..., 0])))(model.params)
        for m in (model, thrifty)
    ]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads[0]["layers"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), *grads)


def test_apply_is_the_head_of_hidden():
    model, ids = random_model(PLAIN), random_ids(PLAIN, 2, 5)
    hidden = model.hidden(model.params, ids)
    assert hidden.shape == (2, 5, 18)
    rows = model.head(model.params, hidden.reshape(10, 18))
    np.testing.assert_allclose(rows.reshape(2, 5, 59), apply(model, ids), atol=1e-6)


def test_bfloat16_parameters_compute_in_bfloat16_close_to_float32():
    model, ids = random_model(EVERYTHING, jnp.bfloat16), random_ids(EVERYTHING, 1, 9)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    low, high = apply(model, ids), model.apply(wide, ids)
    assert low.dtype == jnp.bfloat16
    # Eight bits of mantissa through two layers.
    assert np.linalg.norm(low.astype(jnp.float32) - high) < 0.05 * np.linalg.norm(high)


def test_a_model_of_70_billion_is_described_at_once_and_in_no_memory():
    config = ModelConfig("llama", 128256, 8192, 28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128)
    start = time.process_time()
    model = Model.abstract(config, jnp.bfloat16)
    assert time.process_time() - start < 5  # well under a second, of this process's own
    assert sum(x.size for x in jax.tree.leaves(model.params)) == 70_553_706_496
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    assert jax.eval_shape(model.apply, model.params, ids).shape == (1, 8, 128256)


@BOTH
def test_init_gives_the_abstract_tree(config):
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)  # noqa: E731
    assert like(Model.init(config, jax.random.key(0)).params) == like(Model.abstract(config).params)


def test_one_layer_is_traced_however_many_there_are():
    def equations(layers):
        model = Model.abstract(dataclasses.replace(PLAIN, num_layers=layers))
        return str(jax.make_jaxpr(model.apply)(model.params, jax.ShapeDtypeStruct((2, 5), jnp.int32))).count("\n")

    assert equations(2) == equations(11)


@BOTH
def test_lifted_on_an_adapted_tree_equals_the_merged_one(config):
    model, ids = random_model(config), random_ids(config, 2, 7)
    spec = lorax.LoraSpec(targets=("layers/*_proj/kernel", "embed/*"), rank=3)
    params = lorax.adapt(jax.random.key(3), model.params, spec, fn=model.apply, args=(ids,))
    trainable, frozen = lorax.split(params)
    params = lorax.join(jax.tree.map(lambda x: x + 0.05, trainable), frozen)
    merged = lorax.merge(params)
    lifted = jax.jit(lorax.lift(model.apply))(params, ids)
    np.testing.assert_allclose(lifted, jax.jit(model.apply)(merged, ids), atol=2e-4)
    assert np.abs(lifted - apply(model, ids)).max() > 1e-2
    cached, _ = jax.jit(lorax.lift(model.decode))(params, ids, model.init_cache(2, 7))
    np.testing.assert_allclose(cached, lifted, atol=1e-4)


def test_all_linear_has_the_known_number_of_parameters_on_smollm2():
    config = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_embeddings=True)
    model = Model.abstract(config)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == 134_515_008
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    for targets, each in (("all-linear", 305_280), (("*q_proj/kernel", "*v_proj/kernel"), 57_600)):
        spec = lorax.LoraSpec(targets=targets, rank=3)
        params = jax.eval_shape(
            lambda key, tree, spec=spec: lorax.adapt(key, tree, spec, fn=model.apply, args=(ids,)),
            jax.random.key(0),
            model.params,
        )
        trainable, _ = lorax.split(params)
        assert sum(x.size for x in jax.tree.leaves(trainable)) == each * 3


def test_a_tree_of_another_model_is_refused_by_path():
    model = random_model(PLAIN)
    ids = random_ids(PLAIN, 1, 3)
    without_head = {k: v for k, v in model.params.items() if k != "lm_head"}
    with pytest.raises(LoraxError, match=r"lm_head/kernel is missing"):
        model.apply(without_head, ids)
    with pytest.raises(LoraxError, match="extra is one weight too many"):
        model.apply({**model.params, "extra": jnp.ones(3)}, ids)


def test_a_full_cache_takes_no_more_tokens():
    model, ids = random_model(PLAIN), random_ids(PLAIN, 1, 4)
    _, cache = model.decode(model.params, ids, model.init_cache(1, 6))
    with pytest.raises(LoraxError, match="4 more tokens do not fit in 6 slots"):
        model.decode(model.params, ids, cache)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_blocks_is_attention(window):
    """Values and gradients, with a last block that is not full, segments, and a window; float64 as the oracle."""
    rng = np.random.default_rng(0)
    shape = dict(q=(2, 13, 4, 6), k=(2, 13, 2, 6), v=(2, 13, 2, 6))
    args = [rng.normal(size=size) for size in shape.values()]
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 13)), axis=1), jnp.int32)
    mix = rng.normal(size=(2, 13, 4, 6))

    def whole(q, k, v):
        return (attend(q, k, v, visible(13, segments, window)) * mix).sum()

    def blocks(q, k, v):
        return (attend_in_blocks(q, k, v, segments, window, block=4) * mix.astype(np.float32)).sum()

    value, got = jax.jit(jax.value_and_grad(blocks, (0, 1, 2)))(*(jnp.asarray(x, jnp.float32) for x in args))
    with jax.enable_x64(True):
        exact, want = jax.value_and_grad(whole, (0, 1, 2))(*(jnp.asarray(x) for x in args))
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_long_rows_are_attended_to_in_blocks(monkeypatch):
    model, ids = random_model(EVERYTHING), random_ids(EVERYTHING, 2, 11)
    segments = jnp.asarray([[1] * 4 + [2] * 7, [1] * 9 + [0] * 2])
    want = apply(model, ids, None, segments)
    monkeypatch.setattr("lorax.models.decoder.LONG", 8)
    jax.clear_caches()
    text = str(jax.make_jaxpr(model.apply)(model.params, ids, None, segments))
    assert "512" in text, "the rows were not cut into blocks"
    np.testing.assert_allclose(apply(model, ids, None, segments), want, rtol=0, atol=2e-5 * np.abs(want).max())
