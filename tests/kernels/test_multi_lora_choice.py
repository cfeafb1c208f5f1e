"""Which implementation of the grouped product serves a case on each platform, and what is chosen again when lowered."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kernels import Shapes, dispatch, explain, target
from lorax_kernels.multi_lora import cases, grouped, segments
from lorax_kernels.multi_lora.cases import Case

TRAIN = Shapes(2048, 4096, 4096, "bfloat16", rank=64, groups=32, total=756)


@pytest.mark.parametrize("op", ["multi_lora", "multi_lora_grad"])
@pytest.mark.parametrize(("platform", "chip"), [("cpu", ""), ("tpu", "v5e"), ("tpu", "v6e"), ("cuda", "sm_90")])
@pytest.mark.filterwarnings("ignore:lorax_kernels:RuntimeWarning")
def test_every_row_is_chosen_or_says_why_not(op, platform, chip):
    choice = explain(op, TRAIN, platform, chip)
    assert {choice.chosen, *choice.refused} == {row.name for row in dispatch.backends(op)}
    assert all(choice.refused.values())


def test_a_program_that_is_split_over_devices_takes_no_kernel():
    """Tracing does not know of it, lowering does: what was traced for a TPU runs here, over eight devices."""
    case = Case("split", 16, 3, 24, 40, (1, 3, 16))
    table, ids = cases.table(case.ranks), cases.ids(case)
    x, a, b, y = cases.arrays(case)
    where = segments(table, ids)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, same = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))

    def value(x, a, b, y):
        return grouped(x, a, b, where, 16, y)

    def loss(x, a, b, y):
        return jnp.sum(jnp.sin(value(x, a, b, y)))

    both = lambda *args: (value(*args), jax.grad(loss, (0, 1, 2))(*args))  # noqa: E731
    want = jax.jit(both)(x, a, b, y)
    with target("tpu", "v5e"):
        assert "backend='pallas'" in str(jax.make_jaxpr(lambda *args: both(*args))(x, a, b, y))
        run = jax.jit(lambda *args: both(*args), in_shardings=(rows, same, same, rows))
        got = run(*jax.device_put((x, a, b, y), (rows, same, same, rows)))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)
    alone, split = (explain("multi_lora", replace(TRAIN, split=z), "tpu", "v5e") for z in (False, True))
    assert alone.chosen == "pallas"
    assert split.chosen != "pallas"
    assert "splits this program over devices" in split.refused["pallas"]
