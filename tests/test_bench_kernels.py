"""`lorax bench kernels`: the whole matrix; what runs on this machine is timed, the rest is as it was compiled."""

from __future__ import annotations

import pytest

from lorax.bench import kernels
from lorax.bench.kernels import OPERATIONS, KernelsConfig, run, tables
from lorax.cli import main
from lorax.errors import LoraxError
from lorax_kernels import dispatch, matrix
from lorax_kernels.multi_lora.cases import CASES as MANY


def test_every_operation_shape_and_implementation_is_there():
    result = run(KernelsConfig(gflop=0))
    timed = {(row["op"], row["shape"]) for row in result["timed"]}
    assert timed == {(item.op, item.shape) for item in matrix.items()}
    assert {op for op, _ in timed} == set(OPERATIONS)
    for op in OPERATIONS:
        named = {row["backend"] for row in result["refused"] if row["op"] == op}
        named |= {row["chosen"] for row in result["timed"] if row["op"] == op}
        assert named == {row.name for row in dispatch.backends(op)}
        for backend in {"pallas", "triton"} & {row.name for row in dispatch.backends(op)}:
            said = [row for row in result["compiled"] if (row["op"], row["backend"]) == (op, backend)]
            assert said, (op, backend)
            assert all(row["says"] for row in said)
    shapes = {row["shape"] for row in result["compiled"] if row["op"] == "multi_lora"}
    assert {case.name for case in MANY} <= shapes
    assert not any(row["seconds"] for row in result["timed"]), "nothing is that small"


def test_what_is_small_is_timed_with_each_implementation_and_the_rest_says_that_it_is_not(monkeypatch, capsys):
    few = [item for item in matrix.items() if item.shapes.k == 576 and item.shapes.n == 192]
    monkeypatch.setattr(matrix, "items", lambda dtype: iter(few))
    result = run(KernelsConfig(gflop=0.06, rounds=1))
    seconds = {(row["op"], row["shape"]): row["seconds"] for row in result["timed"]}
    assert set(seconds["multi_lora", "SmolLM2 135M k/v, decode"]) == {"xla", "xla_onehot", "xla_sorted"}
    assert set(seconds["nf4_matmul", "SmolLM2 135M k/v 576 x 192, 16 rows"]) == {"xla"}
    assert all(value > 0 for some in seconds.values() for value in some.values())
    assert not seconds["multi_lora_grad", "SmolLM2 135M k/v, train"]
    (timed, _, rows), (refused, _, _), (compiled, _, _) = tables(result)
    assert timed.startswith("timed on")
    assert "run on none of them" in compiled
    assert refused == "not chosen here"
    assert any(row[-1].startswith("not timed") for row in rows)
    best = [row for row in rows if row[:2] == ("multi_lora", "SmolLM2 135M k/v, decode")]
    assert sum("fastest" in row[-1] for row in best) == sum("chosen" in row[-1] for row in best) == 1


def test_the_command_prints_three_tables(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "items", lambda dtype: iter(()))
    assert main(["bench", "kernels", "--kernels.rounds", "1", "--kernels.ops", "multi_lora"]) == 0
    out = capsys.readouterr().out
    assert "timed on" in out
    assert "run on none of them" in out
    assert "triton" in out


@pytest.mark.parametrize(
    ("setting", "message"), [({"ops": ("mul",)}, "'mul' is no operation"), ({"rounds": 0}, "0 rounds")]
)
def test_what_makes_no_sense_is_said(setting, message):
    with pytest.raises(LoraxError, match=message):
        kernels.run(KernelsConfig(**setting))
