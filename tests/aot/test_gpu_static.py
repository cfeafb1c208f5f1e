"""The GPU kernels as Triton and ptxas compile them: no spills, few registers, tensor cores, wide loads; on every case.

The committed table holds every case on every chip. Here a part of it is compiled again, another part of the cases on
each chip, and the whole table is held to the bars.
"""

import json
import os
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)

from lorax_kernels.cases import CASES
from lorax_kernels.static.gpu import CHIPS, MOST_DEQUANTISE, MOST_REGISTERS, Program, compile_for, figures, programs

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

TABLE = json.loads((Path(__file__).parents[2] / "kernels/results/gpu.json").read_text())["programs"]


def accept(row, capability):
    assert row["stack"] == 0 or beyond(row), row
    assert row["local"] == 0, row
    if row["op"] == "nf4_dequantise":
        assert row["registers"] <= MOST_DEQUANTISE, row
        return
    assert row["registers"] <= MOST_REGISTERS[capability], row
    assert row["tensor_core"], row
    assert row["bytes_over_least"] <= 1.1, row
    contracted = row["n"] if row["op"] == "nf4_matmul_t" else row["k"]
    assert row["narrowest"] == {"x": widest_aligned(2 * contracted), "codes": 16}, row


def beyond(row):
    """Beyond the bar, and named in the kernels' README: 16 bytes of stack in decode products without factors."""
    decode = (row["op"], row["m"], row["rank"]) == ("nf4_matmul", 16, 0)
    return decode and row["stack"] == 16 and row["chip"] != "sm_80"


def widest_aligned(row_bytes):
    """What one load can take of rows of that many bytes: 16, or less where the next row begins between two sixteens."""
    return min(16, row_bytes & -row_bytes)


def test_the_table_has_every_case_on_every_chip():
    have = {(r["op"], r["m"], r["k"], r["n"], r["rank"], r["chip"]) for r in TABLE}
    want = {(p.op, p.m, p.k, p.n, p.rank, f"sm_{chip}") for p in programs() for chip in CHIPS}
    assert have == want


def test_the_whole_table_keeps_the_bars():
    for row in TABLE:
        accept(row, int(row["chip"].removeprefix("sm_")))
    assert sum(map(beyond, TABLE)) <= 21


@pytest.mark.parametrize("chip", CHIPS)
def test_compiled_again_it_is_as_the_table_says(chip):
    place = CHIPS.index(chip)
    mine = [case for index, case in enumerate(CASES) if index % 12 == 4 * place]
    assert mine
    recorded = {(r["op"], r["m"], r["k"], r["n"], r["rank"]): r for r in TABLE if r["chip"] == f"sm_{chip}"}
    for program in programs(mine):
        row = figures(program, chip)
        assert row == recorded[(program.op, program.m, program.k, program.n, program.rank)]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("m", [16, 2048])
@pytest.mark.parametrize("op", ["nf4_matmul", "nf4_matmul_t"])
def test_x_and_codes_are_loaded_sixteen_bytes_at_a_time(op, m, chip):
    """Without factors, and with one scale to a row of a tile, what is no scale is x or a code."""
    loads = compile_for(Program(op, m, 4096, 4096, 0, block_size=256), chip)["loads"]
    assert set(loads) <= {"4", "16"}
    assert loads["16"] >= 2
