"""Kernels under `shard_map`, as a weight's own placement says: values, gradients, and what crosses the wire."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_kernels import force, nf4, nf4_matmul, target
from lorax_kernels.nf4_matmul import api, kernels
from lorax_kernels.placement import Placement

pytestmark = pytest.mark.optimised

K, N, ROWS = 1024, 512, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("core", [("model", "data"), (None, "model"), ("model", None), ("data", "model")])
def test_products_on_a_mesh(platform, core):
    """Column- and row-parallel, with and without FSDP on the other axis, through the kernels' own derivative."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    q = nf4.for_platform(nf4.quantize(draw(N, K) * 0.05), platform)
    dense = np.asarray(nf4.dequantize(q), np.float64).T
    spec = P(*(reversed(core) if platform == "tpu" else core))
    q = replace(
        q,
        codes=jax.device_put(q.codes, NamedSharding(mesh, spec)),
        scales=jax.device_put(q.scales, NamedSharding(mesh, P(*core))),
        placement=Placement(mesh, ("data",), core),
    )
    args = draw(ROWS, K), 0.1 * draw(K, 3), 0.1 * draw(3, N), jnp.float32(0.7)
    x = jax.device_put(args[0], NamedSharding(mesh, P("data", None)))

    def fused(x, a, b, s, q):
        return (kernels.lora_matmul("plain", x, api._at_use(q), a, b, s) ** 2).sum()

    with target("tpu", "v5e"):
        program = jax.jit(jax.grad(fused, (0, 1, 2, 3))).lower(x, *args[1:], q).compile()
        alone = jax.jit(lambda x, q: kernels.matmul("plain", x, api._at_use(q), False))(x, q)
    np.testing.assert_allclose(alone, np.asarray(x, np.float64) @ dense, rtol=0, atol=1e-4)
    got = program(x, *args[1:], q)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in args]
        want = jax.grad(lambda x, a, b, s: ((x @ dense + s * (x @ a) @ b) ** 2).sum(), (0, 1, 2, 3))(*wide)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", program.as_text())
    weights = [dtype for dtype, dims in gathered if np.prod([int(d) for d in dims.split(",")]) * 16 >= K * N]
    assert set(weights) <= {"u8", "s32"}, "a weight was gathered as values"
    assert bool(weights) == ("data" in core), gathered


def test_plain_jax_gathers_codes_and_not_values():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    q = nf4.quantize(draw(N, K) * 0.05)
    place = NamedSharding(mesh, P(None, "data"))
    q = replace(q, codes=jax.device_put(q.codes, place), scales=jax.device_put(q.scales, place))
    q = replace(q, placement=Placement(mesh, ("data",), (None, "data")))
    x = jax.device_put(draw(ROWS, K), NamedSharding(mesh, P("data")))
    with force("xla"):
        text = jax.jit(nf4_matmul.matmul).lower(x, q).compile().as_text()
    assert re.search(rf"u8\[{N},{K // 2}\]\S* all-gather\(", text)
    assert not re.search(rf"f32\[{N},{K}\]\S* all-gather\(", text)


def test_a_part_is_what_decides_who_serves_it():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    place = Placement(mesh, ("data",), ("model", "data"))
    assert place.local(64, 1024, 512) == (32, 1024, 128)
    assert place.local(63, 1024, 512) == (63, 512, 128), "rows that do not divide stay whole, and W is split"
    many = Placement(mesh, ("data",), ("model", None, None, "data"))
    assert many.as_matrix(3).core == ("model", "data")
    assert Placement(mesh, (), (None, "model", "data")).as_matrix(2).core == (None, "data")


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "backward"])
def test_a_part_that_is_no_whole_tile(transpose):
    """320 inputs of a TPU's words, as a row-parallel split leaves them: filled up with blocks that count nothing."""
    q = nf4.to_tpu(nf4.quantize(draw(128, 512) * 0.05))
    dense = np.asarray(nf4.dequantize(q), np.float64).T[:320]
    x = draw(8, 128 if transpose else 320)
    for backend in ("plain", "pallas"):
        call = kernels.Call(backend, "v5e", transpose, False, 64, True, interpret=backend == "pallas")
        (y,) = kernels._run(call, x, q.codes[:40], kernels.resolve_scales(q)[:, :5])
        want = np.asarray(x, np.float64) @ (dense.T if transpose else dense)
        np.testing.assert_allclose(y, want, rtol=0, atol=2e-2 * np.abs(want).max())
