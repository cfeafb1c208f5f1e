"""`experiments/choosing.py`: its arms, its ledger, and one arm on a tiny base."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "experiments" / "choosing.py"


@pytest.fixture(scope="module")
def choosing():
    spec = importlib.util.spec_from_file_location("choosing", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["choosing"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["choosing"]


def test_the_whole_grid_is_what_the_question_asks_for(choosing):
    found = list(choosing.arms(choosing.BUDGETS["whole"]))
    assert len(found) == len({arm.name for arm in found}) == 10 * 3 * 4 * 2
    assert {arm.way for arm in found} == set(choosing.WAYS)
    assert all(len({arm.lr for arm in found if arm.way == way}) == 4 for way in choosing.WAYS)
    # Every way at one rate before any at the next.
    first = found[: 10 * 3]
    assert {(arm.way, arm.task) for arm in first} == {(arm.way, arm.task) for arm in found}


def row(way, lr, loss, seed=0):
    return {
        "arm": f"medical/{way}/{lr:g}/{seed}", "task": "medical", "way": way, "lr": lr, "seed": seed, "accuracy": 0.5,
        "loss": loss, "before": {"accuracy": 0.0, "loss": 3.0},
        "forgetting": {"general": 0.1, "legal": 0.3, "code": 0.5},
        "parameters": 7, "bytes": 28, "step_seconds": None, "change": 0.01, "steps": 2, "peak_bytes": 10**9,
    }  # fmt: skip


def test_the_best_rate_is_that_of_the_least_mean_loss_and_missing_arms_are_said(choosing, tmp_path):
    rows = [row("lora-16", 1e-3, 1.0), row("lora-16", 1e-3, 3.0, 1), row("lora-16", 3e-4, 1.5), row("full", 1e-4, 1.7)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"arm": "cut')
    assert choosing.read(tmp_path) == rows
    args = choosing.Args(budget="small", out=tmp_path)
    choosing.summarise(args, rows, list(choosing.arms(choosing.BUDGETS["small"])))
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["way"], r["lr"], r["loss"]) for r in found["best"]] == [("lora-16", 3e-4, 1.5), ("full", 1e-4, 1.7)]
    assert found["best"][0]["other_tasks"] == pytest.approx(0.4)
    assert found["run"] == 4
    assert len(found["missing"]) == 4 * 4 - 3  # a second seed is none of this budget's
    table = (tmp_path / "summary.md").read_text()
    assert "4 of 16 runs" in table
    assert "| medical | lora-16 | 0.0003 | 2 | 0.500 | 1.500 | +0.100 | +0.400 |" in table
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"


def test_one_arm_measures_all_of_the_table(choosing, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    small = replace(choosing.BUDGETS["small"], base=str(tiny_base), steps=3, batch=2, items=3, elsewhere=2)
    found = choosing.run_arm(small, choosing.Arm("medical", "head", 0.01, 0), tmp_path)
    assert found["arm"] == "medical/head/0.01/0"
    assert set(found["forgetting"]) == {"general", "legal", "code"}
    assert all(value != 0 for value in found["forgetting"].values())
    assert found["parameters"] == 16 * 260
    assert 0 < found["change"] < 1
    assert found["before"]["loss"] != found["loss"]
    assert set(row("head", 0.01, 1.0)) - {"peak_bytes"} <= set(found)
    assert not any(path.is_dir() for path in (tmp_path / "work").iterdir()), "the run's model is not kept"
