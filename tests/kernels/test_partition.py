"""Kernels on a mesh and under vmap: their rules, with the plain meaning of a call in the place of a chip's kernel."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_kernels import nf4, target
from lorax_kernels.nf4_matmul import kernels

K, N, ROWS = 1024, 512, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def weight(platform):
    q = nf4.for_platform(nf4.quantize(draw(N, K) * 0.05), platform)
    return q, np.asarray(nf4.dequantize(q), np.float64).T


def near(got, want):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.optimised
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("what", ["columns", "rows"])
def test_split_weights_stay_where_they_are(platform, what):
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, dense = weight(platform)
    spec, rows = (P("m", None), P("d", None)) if what == "columns" else (P(None, "m"), P("d", "m"))
    place = NamedSharding(mesh, P(*reversed(spec)) if platform == "tpu" else spec)
    q = replace(q, codes=jax.device_put(q.codes, place))
    x = jax.device_put(draw(ROWS, K), NamedSharding(mesh, rows))
    with target("tpu", "v5e"):
        program = jax.jit(lambda x, q: kernels.matmul("plain", x, q)).lower(x, q).compile()
        back = jax.jit(jax.grad(lambda x, q: (kernels.matmul("plain", x, q) ** 2).sum()))(x, q)
    text = program.as_text()
    assert not re.search(r"all-gather(-start)?\([^)]*(u8|s32)\[", text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == (what == "rows")
    wide = np.asarray(x, np.float64)
    near(program(x, q), wide @ dense)
    near(back, 2 * (wide @ dense) @ dense.T)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_mapped_batch_is_more_rows_and_mapped_factors_are_one_by_one(platform):
    q, dense = weight(platform)
    x, a, b = draw(3, ROWS, K), 0.1 * draw(3, K, 5), 0.1 * draw(3, 5, N)
    wide = [np.asarray(array, np.float64) for array in (x, a, b)]
    with target("tpu", "v5e"):
        near(jax.vmap(lambda x: kernels.matmul("plain", x, q))(x), wide[0] @ dense)
        many = jax.vmap(lambda x, a, b: kernels.lora_matmul("plain", x, q, a, b, jnp.float32(0.7)))(x, a, b)
    near(many, wide[0] @ dense + 0.7 * (wide[0] @ wide[1]) @ wide[2])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_of_the_fused_product(platform):
    q, dense = weight(platform)
    args = draw(ROWS, K), 0.1 * draw(K, 3), 0.1 * draw(3, N), jnp.float32(0.7)
    with target("tpu", "v5e"):
        fused = lambda x, a, b, s: (kernels.lora_matmul("plain", x, q, a, b, s) ** 2).sum()  # noqa: E731
        got = jax.jit(jax.grad(fused, (0, 1, 2, 3)))(*args)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in args]
        want = jax.grad(lambda x, a, b, s: ((x @ dense + s * (x @ a) @ b) ** 2).sum(), (0, 1, 2, 3))(*wide)
    for ours, theirs in zip(got, want, strict=True):
        near(ours, np.asarray(theirs))
