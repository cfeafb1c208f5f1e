"""Memory: what the frozen base weighs, what loading takes, and that dequantised weights do not outlive their use."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

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


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_quantised_parameter_weighs_four_bits_and_an_eighth():
    before = live_bytes()
    params = {"w": jax.random.normal(jax.random.key(0), (3, 1024, 2048), jnp.bfloat16)}
    packed, again = (quantize(params, targets="w")["w"] for _ in range(2))
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(again), strict=True):
        assert (one == other).all(), "the same bits each time"
    count = params["w"].size
    del again, params, one, other
    # 4 for the code, 8 / 64 for the scale's code, 32 / (64 * 256) for its scale; an offset for each layer.
    bits = 8 * (live_bytes() - before) / count
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert round(bits, 3) == 4.127
    assert 8 * packed.nbytes / count == bits


# Writes a small and a large model; loads the first, then the second in 4 bits, and says how far the peak rose for it.
PEAK = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from lorax.io import safetensors
from lorax.io.atomic import write_json
from lorax.models import ModelConfig, load
from lorax.models.hf import kinds
from lorax.quant import QuantSpec

def write(folder, layers):
    config = ModelConfig("llama", 97, 512, 1536, num_layers=layers, num_heads=8, num_kv_heads=8, head_dim=64)
    dtype, tensors = np.dtype(ml_dtypes.bfloat16), []
    for kind in kinds(config):
        shape = tuple(reversed(kind.shape)) if kind.transposed else kind.shape
        make = lambda shape=shape: np.full(shape, 0.02, dtype)
        for i in range(layers if kind.stacked else 1):
            tensors.append(safetensors.Entry(kind.file_name(False, i), shape, dtype, make))
    folder.mkdir()
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config.to_hf())

peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
write(folder / "small", 2)
write(folder / "large", 24)
load(folder / "small", jnp.bfloat16, quantize=QuantSpec())
before = peak()
model = load(folder / "large", jnp.bfloat16, quantize=QuantSpec())
jax.block_until_ready(model.params)
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(model.params)))
"""


def test_a_base_never_exists_in_16_bits(tmp_path):
    """The peak of a whole process, pages of the file included: 24 layers are 163 MB in 16 bits, and 42 MB in 4."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, packed = map(int, done.stdout.split())
    assert packed < 45e6
    assert grown < 1.6 * packed, f"{grown / 1e6:.0f} MB for {packed / 1e6:.0f} MB of weights"
