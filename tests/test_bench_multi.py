"""The bench of many adapters: a small run of the whole, and what its figures compare."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from lorax import LoraxError
from lorax.bench.command import Args
from lorax.bench.multi import Knobs, MultiConfig, figures, merged, run
from lorax.bench.multi_worker import RANKS, choice
from lorax.bench.train_step import BenchConfig
from lorax.models import Model, ModelConfig, save_hf


def test_a_run_without_a_peer(tmp_path):
    config = ModelConfig("llama", 31, 192, 64, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=64)
    model = Model.init(config, jax.random.key(0))
    save_hf(tmp_path / "base", model, model.params)
    sizes = {"batch_size": 6, "seq_len": 7, "adapters": 6, "large": 15, "tenants": 2, "train": 3, "examples": 2}
    config = MultiConfig(base=str(tmp_path / "base"), steps=2, rounds=2, threads=1, runs=2, **sizes)
    forwards, training = ("mixed", "banks", "tenants"), ("together", "alone")
    first, second = (run(replace(config, parts=parts)) for parts in (forwards, training))
    result = merged(first, second)
    assert result["config"]["parts"] == [*forwards, *training]
    with pytest.raises(LoraxError, match="steps=2, and this one has 3"):
        merged(first, {**second, "config": {**second["config"], "steps": 3}})
    together, alone = (result["training"][f"lorax: {name}"] for name in ("together", "one after another"))
    assert together["seconds"] >= together["first"] >= together["step"]
    assert alone["losses"] == pytest.approx(together["losses"][:2], rel=1e-3)
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert {name for name, value in values.items() if value is None} == {
        "PEFT_mixed_batch_of_2_against_ours",
        "3_runs_of_PEFT_against_together",
        "3_launches_of_PEFT_against_together",
    }
    assert all(value > 0 for value in values.values() if value is not None)
    # Queries and values alone: 2 layers of (192 + 192) + (192 + 64) numbers of four bytes for each rank.
    few = {name: about["bytes"] for name, about in result["bank"].items()}
    assert few["lorax: small bank"] == sum(RANKS) * 2 * (384 + 256) * 4
    assert few["lorax: large bank"] == 3 * few["lorax: small bank"]
    assert result["versions"]["jax"] == jax.__version__


def test_figures_are_ratios_the_right_way_up():
    names = ("mixed", "base", "large bank", "small bank", "tenants")
    seconds = {f"lorax: {name}": {"median": float(i + 1)} for i, name in enumerate(names)}
    both = {"lorax: one after another": 6 / 16, "lorax: together": 7.0, "PEFT: one after another": 35 / 16}
    training = {name: {"seconds": s, "ready": 1.0} for name, s in both.items()}
    seconds |= {"PEFT: mixed": {"median": 20.0}}
    found = figures(MultiConfig(), seconds, training)
    assert {name: (f["value"], f["met"]) for name, f in found.items()} == {
        "32_adapters_against_the_base": (0.5, True),
        "bank_of_1000_against_5": (0.75, True),
        "PEFT_mixed_batch_of_8_against_ours": (4.0, True),
        "16_runs_against_together": (0.8571, False),
        "16_runs_of_PEFT_against_together": (5.0, True),
        "16_launches_against_together": (22 / 8, None),
        "16_launches_of_PEFT_against_together": (51 / 8, None),
    }


def test_batches_of_both_banks_have_the_same_ranks_and_the_large_one_different_adapters():
    small, large = ([choice(row, 32, adapters) for row in range(32)] for adapters in (5, 1000))
    assert [i % 5 for i in small] == [i % 5 for i in large]
    assert len(set(large)) == 32
    assert max(large) < 1000


def test_settings():
    with pytest.raises(LoraxError, match="at least 1"):
        run(MultiConfig(adapters=0))
    with pytest.raises(LoraxError, match="multiple of 5"):
        run(MultiConfig(large=7))
    args = Args(
        "multi", BenchConfig(rounds=2, peer_python="python", batch_size=4), multi=Knobs(large=50, parts=("banks",))
    )
    assert args._multi() == MultiConfig(rounds=2, peer_python="python", batch_size=4, large=50, parts=("banks",))
