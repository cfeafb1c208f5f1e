"""Sampling against NumPy in float64: penalties, filters, log-probabilities; draws by their seed alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.serve import sampling
from lorax.serve.sampling import Settings, draw, plain_settings

# More than the few that usually settle it, so that sorting everything is reached too.
VOCAB, ROWS, LENGTH = 700, 8, 12
CASES = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 30.0, "top_p": 0.97},
    {"temperature": 1.0, "top_k": 600, "repetition": 1.7, "presence": 0.5, "frequency": 0.3},
    {"temperature": 1e-30, "min_p": 0.5},
]


def settings():
    out = plain_settings(ROWS, LENGTH)
    rng = np.random.default_rng(3)
    for r, case in enumerate(CASES):
        for name, value in case.items():
            getattr(out, name)[r] = value
        out.key[r] = (r, 17 + r)
        out.position[r] = 5 + r
        out.seen[r, :9] = rng.integers(0, 6, 9)
        out.prompt[r] = 4
    out.want_logprobs[...] = True
    return out


def oracle(logits, s, r):
    """Log-weights of the tokens that may be drawn, float64; -inf for the others."""
    x = logits[r].astype(np.float64)
    seen = [t for t in s.seen[r] if t >= 0]
    answer = [t for t in s.seen[r][s.prompt[r] :] if t >= 0]
    for t in set(seen):
        x[t] = x[t] / s.repetition[r] if x[t] > 0 else x[t] * s.repetition[r]
    for t in set(answer):
        x[t] -= s.presence[r] + s.frequency[r] * answer.count(t)
    if s.temperature[r] < np.finfo(np.float32).tiny:
        return np.where(np.arange(VOCAB) == np.argmax(x), 0.0, -np.inf)
    x = (x - x.max()) / np.float64(s.temperature[r])
    if s.top_k[r]:
        x[x < np.sort(x)[-s.top_k[r]]] = -np.inf
    if s.top_p[r] < 1:
        p = np.exp(x) / np.exp(x).sum()
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        x[x < x[order[before < s.top_p[r]]].min()] = -np.inf
    if s.min_p[r]:
        x[np.exp(x) < s.min_p[r]] = -np.inf
    return x


@pytest.fixture(scope="module")
def drawn():
    """(logits, settings, function that draws with other keys)."""
    logits = 3 * np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
    logits[:, :6] += 6.0
    return logits, settings(), jax.jit(draw)


def uniform(s, r):
    key = jax.random.wrap_key_data(jnp.asarray(s.key[r]), impl="threefry2x32")
    return float(jax.random.uniform(jax.random.fold_in(key, int(s.position[r])), (), jnp.float32))


def may_be(weights, u):
    """Tokens whose part of the cumulative distribution u is in, or within rounding of."""
    p = np.exp(weights)
    ends = np.cumsum(p) / p.sum()
    return {int(np.searchsorted(ends, min(max(u + d, 0.0), 1 - 1e-12), side="right")) for d in (-2e-6, 0.0, 2e-6)}


def test_every_row_draws_as_numpy_does(drawn):
    logits, s, run = drawn
    kept = [np.isfinite(oracle(logits, s, r)).sum() for r in range(ROWS)]
    assert kept[0] == 1
    assert kept[1] == VOCAB
    assert kept[2] == 5
    assert kept[5] > sampling.FEW, "no row needs all tokens sorted"
    for turn in range(12):
        for r in range(ROWS):
            s.key[r] = (r, 100 * turn + r)
        token = np.asarray(run(logits, s).token)
        for r in range(ROWS):
            weights = oracle(logits, s, r)
            assert np.isfinite(weights[token[r]]), (turn, r, CASES[r])
            assert token[r] in may_be(weights, uniform(s, r)), (turn, r, CASES[r])


def test_logprobs_are_those_of_the_plain_logits(drawn):
    logits, s, run = drawn
    out = run(logits, s)
    for r in range(ROWS):
        x = logits[r].astype(np.float64)
        log_p = x - x.max() - np.log(np.exp(x - x.max()).sum())
        np.testing.assert_allclose(out.logprob[r], log_p[out.token[r]], atol=1e-5)
        best = np.argsort(-log_p, kind="stable")[:20]
        assert out.top[r].tolist() == best.tolist()
        np.testing.assert_allclose(out.top_logprob[r], log_p[best], atol=1e-5)


def test_a_row_draws_the_same_wherever_it_stands_and_whoever_is_beside(drawn):
    logits, s, run = drawn
    first = np.asarray(run(logits, s).token)
    turned = Settings(*(x if x.ndim == 0 else np.roll(x, 3, axis=0) for x in s))
    assert np.roll(first, 3).tolist() == np.asarray(run(np.roll(logits, 3, axis=0), turned).token).tolist()
    alone = plain_settings(ROWS, LENGTH)
    for x, y in zip(alone, s, strict=True):
        if x.ndim:
            x[4] = y[4]
    assert np.asarray(run(logits, alone).token)[4] == first[4]


def test_draws_have_the_frequencies_of_the_softmax():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)).repeat(64, axis=0)
    s, run, count = plain_settings(64, 2), jax.jit(draw), np.zeros(4)
    s.temperature[:] = 1.0
    for turn in range(60):
        s.key[:, 1] = np.arange(64) + 64 * turn
        count += np.bincount(np.asarray(run(logits, s).token), minlength=4)
    expected = count.sum() * np.array([0.5, 0.25, 0.125, 0.125])
    # Chi-square with 3 degrees of freedom: above 21 once in ten thousand.
    assert ((count - expected) ** 2 / expected).sum() < 21


def test_halving_finds_what_sorting_finds():
    """Top-k and top-p where the few likeliest do not settle them, against all of them in order."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((6, VOCAB)).astype(np.float32)
    logits[3] = np.round(logits[3] * 2) / 2
    logits -= logits.max(axis=1, keepdims=True)
    s = plain_settings(6, 2)
    s.top_k[:] = 0, 300, 650, 500, VOCAB, 1
    s.top_p[:] = 0.9, 1.0, 0.97, 0.9, 0.99, 1.0
    s.temperature[:] = 1.0
    got = np.asarray(jax.jit(sampling._halved)(logits, s))
    for r in range(6):
        kept = np.isfinite(oracle(logits, s, r))
        np.testing.assert_array_equal(logits[r] >= got[r], kept)


def test_the_first_of_the_largest_is_taken_wherever_it_is():
    x = np.zeros((5, VOCAB), np.float32)
    for r, at in enumerate((0, 63, 64, 640, VOCAB - 1)):
        x[r, at] = 1.0
    x[1, 200] = 1.0
    x = np.concatenate([x, -1 - x])
    np.testing.assert_array_equal(jax.jit(sampling._argmax)(x), np.argmax(x, axis=1))
