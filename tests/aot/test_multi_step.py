"""A mixed-adapter step through scanned layers, compiled for a TPU and an H100 that are not here, kernels and all."""

import os
import re

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from test_gpu_jax import H100

import lorax
from lorax_kernels import target

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore")]

LAYERS, WIDTH, INNER, ADAPTERS, RANK = 3, 256, 384, 8, 24


def device(platform):
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    found = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1")
    return found.devices[0]


def apply(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    return jax.lax.scan(layer, x, params)[0]


def program(platform, chip, rows):
    """The gradient of a batch of examples, an adapter each, as text."""
    base = {"up": jnp.ones((LAYERS, WIDTH, INNER)), "down": jnp.ones((LAYERS, INNER, WIDTH))}
    x = jnp.ones((2, WIDTH))
    spec = lorax.LoraSpec(targets="*", rank=RANK)
    adapters = {str(i): lorax.adapt(jax.random.key(i), base, spec, fn=apply, args=(x,)) for i in range(ADAPTERS)}
    params = lorax.attach(jax.tree.map(lambda w: w.astype(jnp.bfloat16), base), lorax.stack(adapters))
    trainable, frozen = lorax.split(params)
    model = lorax.lift(apply)

    def loss(trainable, frozen, ids, xs):
        params = lorax.join(trainable, frozen)
        out = jax.vmap(lambda id, x: model(lorax.select(params, id), x))(ids, xs)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    put = SingleDeviceSharding(device(platform))
    shape = lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=put)  # noqa: E731
    ids, xs = jnp.zeros(4, jnp.int32), jnp.ones((4, rows, WIDTH), jnp.bfloat16)
    args = jax.tree.map(shape, (trainable, frozen, ids, xs))
    with target(platform, chip):
        return jax.jit(jax.grad(loss)).lower(*args).compile().as_text()


def test_on_a_tpu():
    text = program("tpu", "v5e", 64)
    # Two weights a layer: forward, backward in x, and the gradients of both factors; a layer's program is there once.
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * 4
    # A layer's scan takes its factors from the whole bank, of which it makes no copy.
    total = ADAPTERS * RANK
    assert not re.search(rf"= f32\[{LAYERS * total},({WIDTH}|{INNER})\]\S* (copy|convert|transpose)\(", text)


def test_on_a_gpu(ptxas):
    text = program("cuda", "sm_90", 64)
    # As above, two launches each, of which the first are made once for two of them.
    assert 2 * 6 <= len(re.findall(r"custom_call_target=\"triton_kernel_call\"", text)) <= 2 * 8
