"""Dequantised weights do not outlive their use: what the compiler sets aside for a step over scanned layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, adapt, join, lift, quantize, split

pytestmark = pytest.mark.optimised

LAYERS, WIDTH, ROWS = 6, 512, 8
# One layer as a CPU multiplies it: 16-bit numbers are widened there. Chips' kernels write no such array at all.
LAYER_BYTES = 4 * WIDTH * WIDTH


def forward(params, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(layer, x, params["w"])[0]


def temporary(step, *args):
    return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_one_layer_at_a_time_is_dequantised(backward):
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
    params = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)}
    packed = quantize(params, targets="w", fn=forward, args=(x,))
    adapted = adapt(jax.random.key(0), packed, LoraSpec(targets="w", rank=4), fn=forward, args=(x,))
    trainable, frozen = split(adapted)
    loss = lambda t, frozen, x: jnp.sum(lift(forward)(join(t, frozen), x).astype(jnp.float32))  # noqa: E731
    step = jax.grad(loss, (0, 2)) if backward else loss
    # Going back there are two products with a layer's weight, the one computed again and the one for dx.
    used = temporary(step, trainable, frozen, x)
    assert used < (2.3 if backward else 1.2) * LAYER_BYTES
    # With as many layers again nothing grows but what is saved for the backward pass: a row of activations a layer.
    twice = {"w": jax.ShapeDtypeStruct((2 * LAYERS, WIDTH, WIDTH), jnp.bfloat16)}
    packed = quantize(twice, targets="w", fn=forward, args=(x,))
    adapted = adapt(jax.random.key(0), packed, LoraSpec(targets="w", rank=4), fn=forward, args=(x,))
    more = temporary(step, *split(adapted), x)
    assert more - used < LAYER_BYTES / 4
