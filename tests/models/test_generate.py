"""Generation against the slow way: the whole text read again for every token."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig, generate
from lorax.models.generate import _run, keep_nucleus

CONFIG = ModelConfig(
    "qwen3", 61, 20, 33, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, sliding_window=9
)
PROMPTS = [[1, 2, 3], [5], list(range(18))]


@pytest.fixture(scope="module")
def model():
    made = Model.init(CONFIG, jax.random.key(0))
    # Ten times the usual weights: with small ones a random model repeats one token for ever.
    return dataclasses.replace(made, params=jax.tree.map(lambda x: x * 10, made.params))


def slowly(model, params, prompt, count):
    text = list(prompt)
    apply = jax.jit(model.apply)
    for length in range(len(prompt), len(prompt) + count):
        padded = np.zeros((1, 48), np.int32)
        padded[0, :length] = text
        text.append(int(apply(params, padded)[0, length - 1].argmax()))
    return text[len(prompt) :]


def test_greedy_equals_reading_the_whole_text_again(model):
    expected = [slowly(model, model.params, prompt, 20) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 10
    assert generate(model, model.params, PROMPTS, 20) == expected
    # Alone or in company, a prompt continues the same way.
    assert generate(model, model.params, PROMPTS[1:2], 20) == expected[1:2]


def test_a_long_prompt_is_read_in_chunks(model):
    prompt = list(np.arange(300) * 7 % 61)
    whole = model.apply(model.params, np.array([prompt], np.int32))[0, -1].argmax()
    assert generate(model, model.params, [list(map(int, prompt)), [4]], 1)[0] == [int(whole)]


def test_adapted_parameters_generate_like_merged_ones(model):
    spec = lorax.LoraSpec(targets="all-linear", rank=2)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = lorax.adapt(jax.random.key(1), model.params, spec, fn=model.apply, args=(ids,))
    trainable, frozen = lorax.split(params)
    params = lorax.join(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    adapted = generate(model, params, PROMPTS, 9)
    assert adapted == generate(model, lorax.merge(params), PROMPTS, 9)
    assert adapted != generate(model, model.params, PROMPTS, 9)


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_a_row_stops_before_its_end_token(model, where):
    free = generate(model, model.params, PROMPTS, 12)
    stop = free[0][4]
    if where == "config":
        ending = dataclasses.replace(model, config=dataclasses.replace(CONFIG, eos_ids=(stop,)))
    else:
        ending = dataclasses.replace(model, tokenizer=SimpleNamespace(eos_id=stop))
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(ending, model.params, PROMPTS, 12) == expected


def test_one_seed_gives_one_text_and_another_another(model):
    def draw(seed, **more):
        return generate(model, model.params, PROMPTS, 12, temperature=1.5, seed=seed, **more)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # So little of the distribution that only the likeliest token is left.
    assert draw(1, top_p=1e-6) == generate(model, model.params, PROMPTS, 12)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-37])
def test_the_smallest_temperatures_are_greedy(model, temperature):
    greedy = generate(model, model.params, PROMPTS, 5)
    assert generate(model, model.params, PROMPTS, 5, temperature=temperature) == greedy


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    p = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    kept = lambda top: (keep_nucleus(jnp.log(p), jnp.float32(top))[0] > -jnp.inf).tolist()  # noqa: E731
    assert kept(0.39) == [False, True, False, False]
    assert kept(0.69) == [False, True, False, True]
    assert kept(0.89) == [False, True, True, True]
    assert kept(1.0) == [True, True, True, True]


def test_draws_follow_the_distribution():
    config = ModelConfig("llama", 3, 2, 2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
    model = Model.init(config, jax.random.key(0))
    logits = np.log([0.5, 0.3, 0.2]).astype(np.float32)
    # A head that gives these logits whatever comes in: features after the norm are (1, 1) for equal inputs.
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    params = {
        **zeros,
        "embed": {"embedding": jnp.ones((3, 2))},
        "norm": {"scale": jnp.ones(2)},
        "lm_head": {"kernel": jnp.tile(logits / 2, (2, 1))},
    }
    rows = generate(model, params, [[0]] * 64, 32, temperature=1.0, seed=3)
    share = np.bincount(np.concatenate(rows), minlength=3) / 2048
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.04)


def test_prompts_of_one_bucket_share_one_program(model):
    generate(model, model.params, [[1, 2, 3], [4]], 5)
    before = _run._cache_size()
    generate(model, model.params, [[7], [8] * 16], 11)
    generate(model, model.params, [[1] * 9, [8] * 2], 16)
    assert _run._cache_size() == before


def test_nothing_in_nothing_out(model):
    assert generate(model, model.params, [], 5) == []
    assert generate(model, model.params, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[61]], {}, "prompt 0 has a token outside the vocabulary of 61"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(model, prompts, options, message):
    with pytest.raises(LoraxError, match=message):
        generate(model, model.params, prompts, **{"max_new_tokens": 3, **options})
