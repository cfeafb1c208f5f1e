"""The bench of many adapters: a small run of the whole, and what its figures compare."""

from __future__ import annotations

import jax
import pytest

from lorax import LoraxError
from lorax.bench.command import Args
from lorax.bench.multi import MultiConfig, figures, run
from lorax.bench.multi_worker import RANKS, choice
from lorax.bench.train_step import BenchConfig
from lorax.models import Model, ModelConfig, save_hf


def test_a_run_without_a_peer(tmp_path):
    config = ModelConfig("llama", 31, 192, 64, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=64)
    model = Model.init(config, jax.random.key(0))
    save_hf(tmp_path / "base", model, model.params)
    sizes = {"batch_size": 6, "seq_len": 7, "adapters": 6, "large": 15, "tenants": 2, "train": 3, "examples": 2}
    result = run(MultiConfig(base=str(tmp_path / "base"), steps=2, rounds=2, threads=1, **sizes))
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert {name for name, value in values.items() if value is None} == {
        "PEFT_mixed_batch_of_2_against_ours",
        "3_runs_of_PEFT_against_together",
    }
    assert all(value > 0 for value in values.values() if value is not None)
    # Queries and values alone: 2 layers of (192 + 192) + (192 + 64) numbers of four bytes for each rank.
    few = {name: about["bytes"] for name, about in result["bank"].items()}
    assert few["lorax: small bank"] == sum(RANKS) * 2 * (384 + 256) * 4
    assert few["lorax: large bank"] == 3 * few["lorax: small bank"]
    assert result["versions"]["jax"] == jax.__version__


def test_figures_are_ratios_the_right_way_up():
    names = ("mixed", "base", "large bank", "small bank", "tenants", "one after another", "together")
    seconds = {f"lorax: {name}": {"median": float(i + 1)} for i, name in enumerate(names)}
    seconds |= {"PEFT: mixed": {"median": 20.0}, "PEFT: one after another": {"median": 35.0}}
    found = figures(MultiConfig(), seconds)
    assert {name: (f["value"], f["met"]) for name, f in found.items()} == {
        "32_adapters_against_the_base": (0.5, True),
        "bank_of_1000_against_5": (0.75, True),
        "PEFT_mixed_batch_of_8_against_ours": (4.0, True),
        "16_runs_against_together": (0.8571, False),
        "16_runs_of_PEFT_against_together": (5.0, True),
    }


def test_batches_of_both_banks_have_the_same_ranks_and_the_large_one_different_adapters():
    small, large = ([choice(row, 32, adapters) for row in range(32)] for adapters in (5, 1000))
    assert [i % 5 for i in small] == [i % 5 for i in large]
    assert len(set(large)) == 32
    assert max(large) < 1000


def test_settings():
    with pytest.raises(LoraxError, match="at least 1"):
        run(MultiConfig(adapters=0))
    args = Args("multi", BenchConfig(rounds=2, peer_python="python", batch_size=4))
    assert args._multi() == MultiConfig(rounds=2, peer_python="python", batch_size=4)
