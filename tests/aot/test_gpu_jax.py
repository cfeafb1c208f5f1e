"""The kernels inside jitted programs, compiled for an H100 without one: XLA and Triton to machine code."""

import os
import re

import pytest

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from step_support import CONFIG, compiled

from lorax_kernels import Shapes, explain, nf4, nf4_matmul, target
from lorax_kernels.multi_lora import Segments, grouped

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore")]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def gpu(ptxas):
    found = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1")
    return found.devices[0]


def kernels(text: str) -> int:
    """Launches of Triton kernels in a program."""
    return len(re.findall(r"custom_call_target=\"triton_kernel_call\"", text))


def test_the_table_chooses_triton():
    choice = explain("nf4_matmul", Shapes(2048, 4096, 4096, "bfloat16"), "cuda", "sm_90")
    assert choice.chosen == "triton", str(choice)


@pytest.mark.parametrize("rows", [16, 256])
def test_product_and_gradient(gpu, rows):
    q = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct((384, 512), jnp.bfloat16))
    put = SingleDeviceSharding(gpu)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=put)  # noqa: E731
    q = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=put), q)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=put)

    def loss(x, a, b, scale, q):
        return jnp.sum(nf4_matmul.lora_matmul(x, q, a, b, scale).astype(jnp.float32) ** 2)

    with target("cuda", "sm_90"):
        args = (shape(rows, 512), shape(512, 5), shape(5, 384), scale, q)
        text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args).compile().as_text()
    assert kernels(text) == 2
    assert not re.search(r"(f32|bf16)\[(384,512|512,384)\]", text), "W was built"


@pytest.mark.parametrize(("groups", "rows"), [(32, 1), (8, 64)], ids=["decode", "train"])
def test_many_adapters_and_their_gradients(gpu, groups, rows):
    """Two launches for the product and two for each gradient, of which x a^T and dy b^T are made once for two of them;
    and no factor is copied or cast outside of them."""
    k, n, total, rank = 512, 384, 1016, 40
    put = SingleDeviceSharding(gpu)
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=put)  # noqa: E731
    half, wide, whole = jnp.bfloat16, jnp.float32, jnp.int32

    def loss(x, a, b, y, start, ranks, weight):
        out = grouped(x, a, b, Segments(start, start, ranks, weight), rank, y)
        return jnp.sum(out.astype(wide) ** 2)

    groupwise = [shape(whole, groups), shape(whole, groups), shape(wide, groups)]
    args = (shape(half, groups, rows, k), shape(wide, total, k), shape(wide, total, n), shape(half, groups, rows, n))
    with target("cuda", "sm_90"):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args, *groupwise).compile().as_text()
    assert kernels(text) == 6
    assert not re.search(rf"= (f32|bf16)\[{total},({k}|{n})\]\S* (copy|convert|transpose)\(", text)
    assert not re.search(rf"= bf16\[{total},", text)


def test_the_whole_training_step(gpu):
    text = compiled(gpu, "cuda", "sm_90")
    # Seven products a layer, in the forward pass, again in the rematerialised one, and backward.
    assert kernels(text) >= 14
    wide = CONFIG.hidden_size, CONFIG.intermediate_size
    assert not re.search(rf"(f32|bf16)\[({wide[0]},{wide[1]}|{wide[1]},{wide[0]})\]", text), "W was built"
