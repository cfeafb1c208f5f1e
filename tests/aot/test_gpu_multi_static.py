"""The grouped product's GPU kernels as Triton and ptxas compile them: no spills, few registers, tensor cores, wide
loads; on every case.

The committed table holds every case on every chip. Here a few programs are compiled again, others on each chip, and the
whole table is held to the bars.
"""

import json
import os
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)

from lorax_kernels.multi_lora.cases import CASES
from lorax_kernels.static.multi_gpu import CHIPS, MOST_REGISTERS, Program, figures, moved, programs

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

RECORD = json.loads((Path(__file__).parents[2] / "kernels/results/multi_lora_gpu.json").read_text())
TABLE = {(Program(*(row[name] for name in Program._fields)), row["chip"]): row for row in RECORD["programs"]}


def test_the_table_has_every_case_on_every_chip():
    assert set(TABLE) == {(program, f"sm_{chip}") for program in programs() for chip in CHIPS}
    # A program that several cases share is there once.
    assert len({(p.groups, p.rows) for p in programs()}) == len({(c.groups, c.rows) for c in CASES})


def test_the_whole_table_keeps_the_bars():
    for (program, chip), row in TABLE.items():
        assert row["stack"] == row["local"] == 0, row
        assert row["registers"] <= MOST_REGISTERS[int(chip.removeprefix("sm_"))], row
        assert row["tensor_core"], row
        read = {"shrink": {"x", "factor"}, "expand": {"factor", "y"}, "grad": {"x"}}[program.kernel]
        assert row["narrowest"] == dict.fromkeys(read, 16), row
        if program.kernel != "grad":
            assert set(row["stores"]) == {"16"}, row


def test_bytes_are_near_the_least():
    """Of h between two launches, and of a gradient that is summed where it lies: beyond that each thing moves once."""
    assert RECORD["traffic"] == list(moved())
    for row in RECORD["traffic"]:
        decode, train = "decode" in row["case"], "train" in row["case"] or "few" in row["case"]
        if row["op"] == "multi_lora":
            assert row["bytes_over_least"] <= (1.02 if decode else 1.3), row
            if "Llama" in row["case"]:
                assert row["bytes_over_least"] <= 1.15, row
        else:
            assert row["bytes_over_least"] <= (1.65 if train else 2.0), row


@pytest.mark.parametrize("chip", CHIPS)
def test_compiled_again_it_is_as_the_table_says(chip):
    mine = list(programs())[CHIPS.index(chip) :: 11]
    assert {program.kernel for program in mine} == {"shrink", "expand", "grad"}
    for program in mine:
        assert figures(program, chip) == TABLE[program, f"sm_{chip}"]
