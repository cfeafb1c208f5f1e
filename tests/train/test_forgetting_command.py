"""`lorax eval --forgetting`, after a run with an adapter and after one of whole weights."""

from __future__ import annotations

import json

import pytest

from lorax import cli
from lorax.data.demos import TASKS
from lorax.train.config import TrainConfig
from lorax.train.runner import run


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_run_says_what_it_cost_elsewhere(method, tiny_base, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    train, held_out = tiny_data
    settings = {"base": str(tiny_base), "data": str(train), "eval_data": str(held_out), "steps": 3, "batch_size": 4}
    run(TrainConfig(**settings, seq_len=64, rank=3, lr=0.01, method=method), tmp_path / "run")
    words = ["eval", "--adapter", str(tmp_path / "run"), "--forgetting", "--items", "2"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "general" in shown
    report = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert [row["name"] for row in report["sets"]] == ["general", *TASKS]
    assert all(row["change"] == row["after"] - row["before"] != 0 for row in report["sets"])
    assert report["base"] == str(tiny_base)
    assert (tmp_path / "run" / "forgetting.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*words, "--task", "medical"]) == 2
    assert "give --adapter alone" in capsys.readouterr().err
