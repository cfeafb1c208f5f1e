"""`lorax bench methods` on a tiny model: every step runs, and the figures are ratios the right way up."""

from __future__ import annotations

import json

import pytest
import tyro

from lorax import LoraxError
from lorax.bench.command import Args
from lorax.bench.methods import MethodsConfig, figures, run
from lorax.bench.methods_worker import STEPS, Side


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "data.jsonl"
    rows = [{"prompt": "abcdefgh"[i % 8] * (1 + i % 5), "label": "xy"[i % 2]} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


class InThisProcess:
    """Stands for the worker, so that the tests' cheap compiler serves it."""

    def __init__(self, *_):
        self.side = Side()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, op, **request):
        return getattr(self.side, op)(**request)


def test_every_step_runs_and_is_timed(tiny_base, labelled, monkeypatch):
    monkeypatch.setattr("lorax.bench.methods.Worker", InThisProcess)
    found = run(MethodsConfig(base=str(tiny_base), task=labelled, batch_size=3, rank=2, rounds=2))
    assert set(found["steps"]) == set(STEPS) - {"dpo"}
    assert found["steps"]["classification head"]["parameters"] == 16 * 2
    assert found["steps"]["classification head"]["shape"] == [3, 1, 16]
    assert found["steps"]["head"]["shape"][1] > 1
    assert all(len(times["all"]) == 2 for name, times in found["seconds"].items() if name != "analysis")
    assert found["analysis"] == {"seconds": found["seconds"]["analysis"]["median"], "changed": 21, "matrices": 22}
    assert all(figure["value"] > 0 for figure in found["figures"].values())
    json.dumps(found, allow_nan=False)


def test_figures_are_ratios_to_full_fine_tuning():
    medians = {"full": 4.0, "last-2": 1.0, "lora": 2.0, "dora": 3.0, "head": 0.4, "analysis": 21.0}
    found = figures(MethodsConfig(), {name: {"median": value} for name, value in medians.items()})
    assert found["last_2_step_against_full_step"] == {"value": 0.25, "bound": ["most", 0.45], "met": True}
    assert found["lm_head_step_against_full_step"]["met"] is False
    assert found["dora_step_against_lora_step"]["value"] == 1.5
    assert found["classification_head_step_against_full_step"] == {"value": None, "bound": ["most", 0.05], "met": None}
    assert found["analysis_of_rank_16_seconds"]["met"] is False


def test_what_measures_nothing_is_refused():
    with pytest.raises(LoraxError, match="at least 1"):
        run(MethodsConfig(rounds=0))
    with pytest.raises(LoraxError, match="no step 'nonsense'"):
        run(MethodsConfig(steps=("nonsense",)))
    args = tyro.cli(Args, args=["methods", "--rounds", "4", "--rank", "2"])
    assert args._methods() == MethodsConfig(rounds=4, rank=2)
