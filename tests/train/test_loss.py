"""Chunked cross-entropy against the definition over whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.train.loss import cross_entropy, score

D, V = 13, 101


def problem(seed=0, shape=(3, 7), live=0.4):
    k = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(k[0], (*shape, D))
    kernel = jax.random.normal(k[1], (D, V))
    targets = jax.random.randint(k[2], shape, 0, V)
    weights = (jax.random.uniform(k[3], shape) < live).astype(jnp.float32)
    return hidden, kernel, targets, weights


def whole(hidden, kernel, targets, weights):
    logp = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights)


@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 64])
@pytest.mark.parametrize("head_trains", [True, False])
def test_value_and_gradient_equal_the_definition(chunk, head_trains):
    hidden, kernel, targets, weights = problem()

    def chunked(hidden, kernel):
        return cross_entropy(
            lambda rows: rows @ kernel, hidden, targets, weights, head_trains=head_trains, chunk=chunk
        )[0]

    value, (dh, dk) = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, kernel)
    want, (wh, wk) = jax.value_and_grad(whole, (0, 1))(hidden, kernel, targets, weights)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dh, wh, rtol=1e-4, atol=1e-6)
    if head_trains:
        np.testing.assert_allclose(dk, wk, rtol=1e-4, atol=1e-6)


def test_fractional_weights_scale_their_rows():
    hidden, kernel, targets, weights = problem()
    for head_trains in (True, False):
        total, count = cross_entropy(
            lambda rows: rows @ kernel, hidden, targets, weights * 0.25, head_trains=head_trains, chunk=4
        )
        np.testing.assert_allclose(total, 0.25 * whole(hidden, kernel, targets, weights), rtol=1e-6)
        np.testing.assert_allclose(count, 0.25 * weights.sum())


@pytest.mark.parametrize("head_trains", [True, False])
def test_nothing_that_counts_gives_zero_and_no_gradient(head_trains):
    hidden, kernel, targets, weights = problem()

    def f(h):
        return cross_entropy(lambda rows: rows @ kernel, h, targets, weights * 0, head_trains=head_trains)[0]

    value, grad = jax.value_and_grad(f)(hidden)
    assert float(value) == 0.0
    assert not np.any(grad)


def test_chunks_without_a_counting_row_are_not_computed():
    # The head records how often it runs: 21 rows in chunks of 4, three of which count, is one chunk.
    hidden, kernel, targets, _ = problem()
    weights = jnp.zeros((3, 7)).at[0, 6].set(1.0).at[2, 0].set(1.0).at[1, 3].set(1.0)
    calls = []

    def head(rows):
        jax.debug.callback(lambda: calls.append(1))
        return rows @ kernel

    value = jax.jit(lambda h: cross_entropy(head, h, targets, weights, head_trains=False, chunk=4)[0])(hidden)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_allclose(value, whole(hidden, kernel, targets, weights), rtol=1e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("head_trains", [True, False])
def test_whole_logits_are_never_built(head_trains):
    hidden, kernel, targets, weights = problem(shape=(4, 16))

    def loss(h):
        return cross_entropy(lambda rows: rows @ kernel, h, targets, weights, head_trains=head_trains, chunk=8)[0]

    text = jax.jit(jax.grad(loss)).lower(hidden).compile().as_text()
    assert f"f32[8,{V}]" in text
    assert f"f32[64,{V}]" not in text
    assert f"f32[8,8,{V}]" not in text
    assert f"f32[4,16,{V}]" not in text


@pytest.mark.parametrize("head_trains", [True, False])
def test_bfloat16_features_keep_their_dtype_in_the_gradient(head_trains):
    hidden, kernel, targets, weights = problem()
    low, k16 = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def f(h):
        return cross_entropy(lambda r: r @ k16, h, targets, weights, head_trains=head_trains, chunk=4)[0]

    value, grad = jax.value_and_grad(f)(low)
    assert value.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, whole(hidden, kernel, targets, weights), rtol=0.03)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_score_places_every_position(chunk):
    hidden, kernel, targets, weights = problem()
    # Half of the targets are what the head would say.
    best = jnp.argmax(hidden @ kernel, axis=-1).astype(targets.dtype)
    targets = jnp.where(jnp.arange(7) % 2 == 0, best, targets)
    found = jax.jit(lambda h: score(lambda rows: rows @ kernel, h, targets, weights, chunk=chunk))(hidden)
    logp = jax.nn.log_softmax(hidden @ kernel)
    want = -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights
    np.testing.assert_allclose(found.loss, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.hit, (best == targets).astype(jnp.float32) * weights)


@pytest.mark.parametrize("head_trains", [True, False])
def test_parts_chunked_side_by_side_give_the_same(head_trains):
    hidden, kernel, targets, weights = problem(shape=(6, 7))

    def parts(hidden, kernel):
        head = lambda rows: rows @ kernel  # noqa: E731
        return cross_entropy(head, hidden, targets, weights, head_trains=head_trains, chunk=4, groups=3)[0]

    value, (dh, dk) = jax.jit(jax.value_and_grad(parts, (0, 1)))(hidden, kernel)
    want, (wh, wk) = jax.value_and_grad(whole, (0, 1))(hidden, kernel, targets, weights)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dh, wh, rtol=1e-4, atol=1e-6)
    if head_trains:
        np.testing.assert_allclose(dk, wk, rtol=1e-4, atol=1e-6)
