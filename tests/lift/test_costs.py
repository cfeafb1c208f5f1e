"""lift costs nothing: FLOPs, compiled code, tracing and compile time against the plain function."""

from __future__ import annotations

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, lift
from lorax.models import Model, ModelConfig

pytestmark = pytest.mark.optimised

LAYERS, D, F, RANK = 5, 33, 49, 4


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) * 0.1, jnp.float32)


def params(layers=LAYERS):
    return {"up": draw(layers, D, F), "down": draw(layers, F, D), "head": draw(D, 17)}


def model(p, x):
    def layer(x, w):
        return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, {"up": p["up"], "down": p["down"]})
    return x @ p["head"]


def by_hand(frozen, factors, scale, x):
    """The same model with low-rank adapters, written out as one would."""

    def layer(x, ws):
        w, f = ws
        up = x @ w["up"] + scale * (x @ f["up"][0]) @ f["up"][1]
        h = jax.nn.silu(up)
        return x + h @ w["down"] + scale * (h @ f["down"][0]) @ f["down"][1], None

    weights = {"up": frozen["up"], "down": frozen["down"]}
    x, _ = jax.lax.scan(layer, x, (weights, factors), unroll=LAYERS)
    return x @ frozen["head"]


def unrolled(p, x):
    def layer(x, w):
        return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, {"up": p["up"], "down": p["down"]}, unroll=LAYERS)
    return x @ p["head"]


def adapted(layers=LAYERS):
    return lorax.adapt(jax.random.key(0), params(layers), LoraSpec(targets=("up", "down"), rank=RANK))


def flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def test_flops_equal_a_hand_written_lora_within_a_thousandth():
    tree = adapted()
    trainable, frozen = lorax.split(tree)
    x = draw(64, D)

    def lifted(t, x):
        return jnp.sum(lift(unrolled)(lorax.join(t, frozen), x) ** 2)

    hand = {name: (tree[name].A, tree[name].B) for name in ("up", "down")}

    def written(factors, x):
        return jnp.sum(by_hand(params(), factors, 8.0, x) ** 2)

    # The scan is unrolled on both sides: cost_analysis counts the body of a loop once.
    ours, theirs = flops(jax.grad(lifted), trainable, x), flops(jax.grad(written), hand, x)
    assert abs(ours / theirs - 1) < 1e-3
    np.testing.assert_allclose(lifted(trainable, x), written(hand, x), rtol=1e-5)


def sums_of_shape(text, shape):
    """Adds in compiled code whose result has a shape (stacked or one layer's)."""
    dims = "|".join({",".join(map(str, shape)), ",".join(map(str, shape[-2:]))})
    return re.findall(rf"= f32\[(?:1,)?(?:{dims})\]\S* (?:add|dot)\(", text)


def test_the_sum_is_never_built_and_frozen_weights_have_no_gradient():
    tree = adapted()
    trainable, frozen = lorax.split(tree)
    x = draw(64, D)

    def step(t, fn):
        return jax.grad(lambda t: jnp.sum(fn(lorax.join(t, frozen), x) ** 2))(t)

    ours = jax.jit(lambda t: step(t, lift(model))).lower(trainable).compile().as_text()
    merged = jax.jit(lambda t: step(t, lambda p, x: model(lorax.merge(p), x))).lower(trainable).compile().as_text()
    for shape in ((LAYERS, D, F), (LAYERS, F, D)):
        assert sums_of_shape(ours, shape) == []
        assert sums_of_shape(merged, shape) != [], "the check can see a sum"


def python_calls(fn):
    """How many Python functions a call enters. A clock in a test session is not to be trusted; this repeats itself."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count


def test_tracing_costs_about_twice_the_plain_trace():
    shapes = Model.abstract(ModelConfig("llama", 4096, 576, 1536, 30, 9, 3, 64, tie_embeddings=True))
    tree = lorax.adapt(jax.random.key(0), shapes.params, LoraSpec(rank=16))
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    # A fresh function each time: JAX remembers the traces of the same one.
    def plain():
        jax.make_jaxpr(lambda p, i: shapes.apply(p, i))(shapes.params, ids)

    def lifted():
        jax.make_jaxpr(lift(lambda p, i: shapes.apply(p, i)))(tree, ids)

    plain(), lifted()
    # The factors' own operations are part of it: 2.2 in calls is 2.0 in seconds.
    ours, theirs = python_calls(lifted), python_calls(plain)
    assert ours <= 2.4 * theirs, f"{ours} calls against {theirs}"


def test_the_program_does_not_grow_with_scanned_layers():
    """What the compiler is given, and what it makes of it, does not grow with the layers."""

    def lines(layers):
        trainable, frozen = lorax.split(adapted(layers))
        x = draw(64, D)
        grad = jax.grad(lambda t: jnp.sum(lift(model)(lorax.join(t, frozen), x) ** 2))
        lowered = jax.jit(grad).lower(trainable)
        return lowered.as_text().count("\n"), lowered.compile().as_text().count("\n")

    (given3, made3), (given30, made30) = lines(3), lines(30)
    assert given30 == given3
    assert made30 <= 1.05 * made3


def test_the_policy_of_a_checkpoint_is_kept():
    def blocks(policy):
        return jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w.T), policy=policy)

    w = lorax.adapt(jax.random.key(0), {"w": draw(5, 7)}, LoraSpec(targets="w", rank=2))
    trainable, frozen = lorax.split(w)

    def dots(policy):
        fn = lift(lambda p, x: jnp.sum(blocks(policy)(p["w"], x)))
        grad = jax.grad(lambda t, x: fn(lorax.join(t, frozen), x))
        return str(jax.make_jaxpr(grad)(trainable, draw(4, 5))).count("dot_general")

    policies = jax.checkpoint_policies
    assert dots(policies.everything_saveable) < dots(policies.nothing_saveable)
