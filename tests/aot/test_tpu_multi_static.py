"""The grouped product's TPU kernels as libtpu schedules them: few spills, loops that keep the matrix units busy, no
copy of a factor beside the kernel, bytes near the least.

The committed table holds every case on every chip. Here the whole table is held to the bars, and a few programs of each
chip are compiled again.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_kernels import target
from lorax_kernels.multi_lora import Segments, grouped
from lorax_kernels.multi_lora.cases import CASES
from lorax_kernels.static.multi_tpu import (
    CHIPS,
    MOST_BUNDLES,
    MOST_SPILLS,
    PODS,
    Program,
    copies,
    in_a_process,
    lowered,
    moved,
    multiplying_loops,
    programs,
)

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore")]

RECORD = json.loads((Path(__file__).parents[2] / "kernels/results/multi_lora_tpu.json").read_text())
TABLE = {Program(*(row[name] for name in Program._fields)): row for row in RECORD["programs"]}


def test_the_table_has_every_case_on_every_chip():
    assert list(TABLE) == list(programs())
    assert {(p.k, p.n) for p in TABLE} >= {(case.k, case.n) for case in CASES}
    assert {p.chip for p in TABLE} == set(CHIPS)


def test_the_whole_table_keeps_the_bars():
    for program, row in TABLE.items():
        assert row["slots"].get("VSTORE:SPILL", 0) <= MOST_SPILLS, row
        if program.rows >= 64 or program.groups * program.rows > 256:
            for bundles, multiplied in row["products"]:
                # With fewer, a loop is as long as its weights take to arrive.
                assert multiplied < 16 or bundles <= MOST_BUNDLES[program.chip] * multiplied, row


def test_no_factor_is_copied_but_where_its_width_is_not_whole_lanes():
    """There XLA keeps it transposed, and the kernels' README says so."""
    for program, row in TABLE.items():
        whole = program.k % 128 == 0 and program.n % 128 == 0
        assert not (row["copies"] and whole), row
    assert any(row["copies"] for row in TABLE.values())


def test_bytes_are_near_the_least():
    assert RECORD["traffic"] == list(moved())
    for row in RECORD["traffic"]:
        if row["op"] == "multi_lora":
            assert row["bytes_over_least"] <= (2.3 if row["sorted"] else 1.25), row
        else:
            assert row["bytes_over_least"] <= 1.55, row
        assert row["sorted"] == ("tokens" in row["case"])


@pytest.mark.parametrize("chip", CHIPS)
def test_compiled_again_it_is_as_the_table_says(chip):
    mine = [p for p in programs() if p.chip == chip and (p.k, p.n) == (4096, 1024) and p.rank == 64]
    assert {p.op for p in mine} == {"multi_lora", "multi_lora_grad"}
    for row, program in zip(in_a_process(mine), mine, strict=True):
        assert row == TABLE[program]


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
@pytest.mark.parametrize(("chip", "total"), [("v5e", 5), ("v6e", 757), ("tpu7x", 760)])
def test_a_bank_may_end_within_a_tile_of_memory(chip, total, factors):
    for op in ("multi_lora", "multi_lora_grad"):
        program = Program(op, chip, 4, 32, 256, 384, min(64, total), total)
        text = lowered(program, factors).compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1
        # The last rows are copied by themselves, and of 5 ranks these are all.
        assert op == "multi_lora_grad" or total == 5 or not copies(text, program)


def test_on_a_mesh_the_compiler_splits_plain_products_and_shard_map_the_kernel():
    """libtpu takes no kernel apart: a program that it is to split has none, one that is split by hand has one."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=PODS["v5e"]).devices
    mesh = Mesh(np.array(devices), ("data",))
    rows, same = PartitionSpec("data"), PartitionSpec()

    def value(x, a, b, y, start, ranks, weight):
        return grouped(x, a, b, Segments(start, start, ranks, weight), 16, y)

    specs = (rows, same, same, rows, rows, rows, rows)
    by_hand = jax.shard_map(value, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    half, wide, whole = jnp.bfloat16, jnp.float32, jnp.int32
    shapes = ((half, 16, 32, 256), (wide, 256, 256), (wide, 256, 384), (half, 16, 32, 384), (whole, 16), (whole, 16))
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (dtype, *shape), spec in zip((*shapes, (wide, 16)), specs, strict=True)
    ]
    with target("tpu", "v5e"):
        texts = [jax.jit(run).lower(*args).compile().as_text() for run in (value, by_hand)]
    assert ["tpu_custom_call" in text for text in texts] == [False, True]
    assert "all-gather" not in texts[1]


def test_loops_that_multiply_are_told_from_others():
    text = """\
      0   :  { %1 = vmatmul.bf16.gmra.mxu0 %v1 }
    0x1 LB: > { %v2 = vld [vmem:[%s1]] }
    0x2 LB: >> { %2 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %3 = vmatmul.bf16.gmra.mxu1 %v1 }
    0x3   : >> { %4 = vmatmul.bf16.gmra.mxu2 %v1 }
    0x4   : > { %5 = vst [vmem:[%s2] sm:$0xff] /*vst_source=*/%v3 }
    0x5 LB: >> { %6 = vst [vmem:[%s2] sm:$0xff] /*vst_source=*/%v3 }
    0x6   :  { %7 = vst [vmem:[%s2] sm:$0xff] /*vst_source=*/%v3 }
"""
    assert multiplying_loops(text) == [[2, 3]]
