"""Which implementation of the grouped product serves a case on each platform, and what is chosen again when lowered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
    case = Case("split", 16, 3, 24, 40, (100, 3, 64))
    table, ids = cases.table(case.ranks), cases.ids(case)
    x, a, b, y = cases.arrays(case)
    where = segments(table, ids)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, same = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))

    def value(x, a, b, y):
        return grouped(x, a, b, where, 100, y)

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


def test_on_a_tpu_few_ranks_are_two_plain_products_and_so_are_rows_that_would_have_to_be_sorted():
    def chosen(op, chip, **more):
        return explain(op, replace(TRAIN, **more), "tpu", chip).chosen

    assert {chosen("multi_lora", chip) for chip in ("v5e", "v6e", "tpu7x")} == {"pallas"}
    assert chosen("multi_lora_grad", "v5e") == "pallas"
    assert chosen("multi_lora", "v5e", total=128) == "xla_onehot"
    assert chosen("multi_lora", "v5e", m=32, groups=32) == "pallas", "decoding reads the ranks in use alone"
    tokens = {"groups": 2048}
    assert [chosen("multi_lora", chip, **tokens) for chip in ("v5e", "v6e")] == ["pallas", "xla_onehot"]
    assert chosen("multi_lora", "v6e", **tokens, total=1121) == "pallas"
    assert chosen("multi_lora_grad", "v5e", **tokens) == "xla_sorted"
    assert chosen("multi_lora", "v5e", k=576) == "pallas"
    assert chosen("multi_lora", "v5e", k=576, total=2048) == "xla"
    why = explain("multi_lora", replace(TRAIN, **tokens), "tpu", "v6e").refused["pallas"]
    assert "published peaks" in why


def test_on_a_gpu_the_kernels_serve_what_is_more_than_one_weight_of_a_matrix_unit():
    from lorax_kernels.multi_lora import triton_gpu

    refuse = triton_gpu.refuse
    assert refuse("multi_lora", 2048, 64, 64, "bfloat16", 16, 32, "sm_90") is None
    assert "sm_80 and later" in refuse("multi_lora", 2048, 64, 64, "bfloat16", 16, 32, "sm_75")
    assert "dtype float64" in refuse("multi_lora", 2048, 64, 64, "float64", 16, 32, "sm_90")
    assert "an empty product" in refuse("multi_lora", 0, 64, 64, "float32", 16, 32, "sm_90")


def test_on_a_cpu_the_choice_is_near_the_fastest_of_those_measured():
    """The bounds come from this record; noise between two that are alike is no fault of theirs."""
    record = json.loads((Path(__file__).parents[2] / "kernels/results/multi_lora_cpu.json").read_text())
    assert {row["series"] for row in record["rows"]} == {"ranks", "rows"}
    for row in record["rows"]:
        m, width = row["groups"] * row["rows"], record["width"]
        shapes = Shapes(m, width, width, rank=64, groups=row["groups"], total=row["total"])
        taken = row["microseconds"]
        assert set(taken) == {"xla", "xla_onehot", "xla_sorted"}
        assert row["fastest"] == min(taken, key=taken.__getitem__)
        assert taken[explain(row["op"], shapes, "cpu").chosen] <= 1.3 * min(taken.values()), row
