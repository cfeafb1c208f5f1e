"""Uses that ordinary models lack and transformed ones have, in one program, against the merged weight in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rules import GROUPS, IN_OUT, STACKED, Case, close, loss_of, weight, widened, x

from lorax import Axes, dequantize, lift, merge, quantize


@jax.custom_vjp
def times(x, w, n):
    return (x @ w) * n


times.defvjp(lambda x, w, n: ((x @ w) * n, (x, w, n)), lambda r, ct: (ct @ r[1].T * r[2], 5 * r[0].T @ ct, None))


def ragged(groups_last):
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [0], [2])
    return lambda w, x: (
        jax.lax.ragged_dot_general(x, w, GROUPS, numbers)
        if groups_last
        else jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), GROUPS)
    )


def force(w, x):
    """Minus the gradient of an energy: the backward pass of a ragged dot, inside the function."""
    return jax.grad(lambda x: jnp.sum(jnp.sin(0.3 * jax.lax.ragged_dot(x, w, GROUPS))))(x)


def before_the_start(w, x):
    """A start that stays negative counted from the end: the slice begins at zero."""
    return x @ jax.lax.dynamic_slice(w, (jnp.int32(-9), jnp.int32(0)), (3, 5))


CASES = [
    Case("reversed", (3, 5), IN_OUT, lambda w, x: x @ w[::-1, ::-1], (x(4, 3),)),
    Case("start before the start", (5, 5), IN_OUT, before_the_start, (x(4, 3),)),
    Case("custom_vjp with a Python number", (3, 5), IN_OUT, lambda w, x: times(jnp.sin(x), w, 3), (x(4, 3),)),
    Case("ragged, transposed", (4, 5, 3), Axes((0,), (2,), (1,)), ragged(False), (x(6, 3),)),
    Case("ragged, B first", (4, 5, 3), STACKED, ragged(False), (x(6, 3),)),
    Case("ragged, groups last", (3, 5, 4), Axes((2,), (0,), (1,)), ragged(True), (x(6, 3),)),
    Case("ragged, gradient inside", (4, 3, 5), STACKED, force, (x(6, 3),)),
]


@pytest.fixture(scope="module")
def computed():
    """Value and gradients of every case, lifted in float32 and merged in float64: two programs for all."""
    weights = [weight(case, 3) for case in CASES]
    inputs = [tuple(map(jnp.asarray, case.inputs)) for case in CASES]

    def all_of(transform):
        fns = [transform(case.fn) for case in CASES]
        return jax.jit(
            lambda ws, xs: [(fn(w, *x), jax.grad(loss_of(fn))(w, *x)) for fn, w, x in zip(fns, ws, xs, strict=True)]
        )

    got = all_of(lift)(weights, inputs)
    with jax.enable_x64(True):
        want = all_of(lambda fn: lambda w, *xs: fn(merge({"w": w})["w"], *xs))(widened(weights), widened(inputs))
    return got, want


@pytest.mark.parametrize("i", range(len(CASES)), ids=[case.name for case in CASES])
def test_lifted_equals_merged(computed, i):
    (got, grads), (want, through) = computed[0][i], computed[1][i]
    close(got, want)
    close(grads.A, through.A)
    close(grads.B, through.B)


def test_a_layer_before_the_first_is_the_first_when_packed_too():
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 5)).astype(np.float32))}
    packed = quantize(w, targets="w")
    fn = lambda p, i, x: x @ jax.lax.dynamic_slice_in_dim(p["w"], i, 1, 0)[0]  # noqa: E731
    rows = jnp.asarray(x(4, 64))
    close(lift(fn)(packed, jnp.int32(-4), rows), fn(dequantize(packed), jnp.int32(-4), rows), 1e-5)
