"""The bench against a real PEFT: both sides start at the same loss and take turns."""

from __future__ import annotations

import sys

import jax
import pytest

from lorax.bench.train_step import BenchConfig, run
from lorax.models import Model, ModelConfig, save_hf

pytestmark = pytest.mark.peers


def test_both_sides_compute_the_same_and_are_measured(tmp_path):
    config = ModelConfig("llama", 61, 24, 40, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=8)
    model = Model.init(config, jax.random.key(0))
    save_hf(tmp_path / "base", model, model.params)
    # run() itself refuses sides whose parameters, threads or first losses differ.
    result = run(
        BenchConfig(base=str(tmp_path / "base"), rank=2, batch_size=2, seq_len=9, rounds=2, peer_python=sys.executable)
    )
    assert all(figure["value"] is not None for figure in result["figures"].values())
    assert {"torch", "transformers", "peft"} <= set(result["versions"])
    assert result["parameters"]["peft"] == result["parameters"]["lora"]
