"""The bench of the server against a real PEFT: both sides read the same files and write the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax
import lorax.bench
from lorax.bench.protocol import Worker
from lorax.bench.serve import ServeConfig, run
from lorax.models import Model, ModelConfig, generate, save_hf

pytestmark = pytest.mark.peers


def test_both_sides_serve_the_same_adapters_and_are_measured(tmp_path):
    config = ModelConfig("llama", 61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    model = Model.init(config, jax.random.key(0))
    params = jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, model.params)
    model = Model(config, params)
    save_hf(tmp_path / "base", model, params)
    sizes = {"batch": 4, "prompt": 6, "answer": 5, "tenants": 3, "rounds": 1, "pool_mb": 4}
    result = run(
        ServeConfig(
            parts=("together",),
            base=str(tmp_path / "base"),
            folder=str(tmp_path / "made"),
            peer_python=sys.executable,
            **sizes,
        )
    )
    # Of so small a model the times are noise: that there is one is all that can be said.
    assert result["figures"]["decoding_3_adapters_against_PEFT"]["value"] is not None
    assert {"torch", "transformers", "peft"} <= set(result["versions"])

    script = Path(lorax.bench.__file__).with_name("peft_serve_worker.py")
    prompts = np.random.default_rng(3).integers(0, 61, (4, 6)).tolist()
    with Worker("PEFT", [sys.executable, str(script)]) as peer:
        peer.ask(op="load", folder=str(tmp_path / "made"), targets="attention", adapters=3, threads=1)
        found = peer.ask(op="together", prompts=prompts, adapters=3, answer=5)["tokens"]
    for i, prompt in enumerate(prompts):
        adapted = lorax.load_adapter(tmp_path / "made" / f"attention-{i % 3}", params)
        (ours,) = generate(model, adapted, [prompt], 5)
        assert found[i] == ours
    # Without its adapter a row would have come out otherwise.
    plain = generate(model, params, prompts, 5)
    assert plain != found
