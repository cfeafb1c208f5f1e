"""Measuring in one command: here it runs on a CPU, small; on a chip it is the same code."""

from __future__ import annotations

import json

import pytest

from lorax_kernels import measure


def test_it_times_what_serves_each_case_and_writes_it_down(tmp_path, capsys):
    out = tmp_path / "measured.json"
    measure.main([str(out), "--cases", "192x70,64x1", "--rows", "3", "--rounds", "2"])
    found = json.loads(out.read_text())
    assert found["dtype"] == "float32"
    assert found["target"][0] == "cpu"
    assert {(row["op"], row["m"], row["k"], row["n"]) for row in found["rows"]} == {
        (op, 3, *sizes) for op in ("nf4_matmul", "nf4_matmul_t") for sizes in ((192, 70), (64, 1))
    }
    for row in found["rows"]:
        assert row["seconds"].keys() == {"dense", "xla"}, "no other row of the table is for a CPU"
        assert row["best"] == "xla"
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == len(found["rows"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cases", "64x2"), "'64x2' is none of the cases"),
        (("--rows", "0"), "at least 1"),
        (("--rows", "16,x"), "at least 1"),
        (("--rounds", "0"), "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said(words, says, capsys, tmp_path):
    with pytest.raises(SystemExit):
        measure.main([str(tmp_path / "out.json"), *words])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_programs_compute_the_product_and_its_transpose():
    import numpy as np

    for op in ("nf4_matmul", "nf4_matmul_t"):
        runs = measure.programs(op, 5, 192, 70, "float32")
        dense, mine = (np.asarray(program(*args)) for program, args in (runs["dense"], runs["xla"]))
        assert np.linalg.norm(mine - dense) < 0.12 * np.linalg.norm(dense), "4 bits lose a tenth"


def test_the_plain_forms_of_many_adapters_are_timed_beside_each_other(tmp_path, monkeypatch, capsys):
    from lorax_kernels import measure_multi
    from lorax_kernels.multi_lora.cases import Case

    monkeypatch.setattr(measure_multi, "series", lambda: [("rows", Case("small", 6, 2, 24, 24, (3, 5)))])
    measure_multi.main([str(tmp_path / "out.json"), "--rounds", "1"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["op"] for row in found["rows"]] == ["multi_lora", "multi_lora_grad"]
    for row in found["rows"]:
        assert (row["groups"], row["rows"], row["total"]) == (6, 2, 8)
        assert set(row["microseconds"]) == {"xla", "xla_onehot", "xla_sorted"}
        assert row["fastest"] in row["microseconds"]
    assert len(capsys.readouterr().out.splitlines()) == 2
