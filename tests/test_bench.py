"""The bench of a training step: what it counts, what it refuses, and a small run of the whole."""

from __future__ import annotations

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraxError
from lorax.bench import record
from lorax.bench.command import Args, table
from lorax.bench.flops import lora_parameters, lora_products
from lorax.bench.lorax_worker import Side
from lorax.bench.protocol import Worker
from lorax.bench.train_step import BenchConfig, _same, figures, run
from lorax.models import Model, ModelConfig, save_hf

SMOLLM2 = ModelConfig("llama", 49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)


def small(layers=2, width=12, hidden=20, vocab=31):
    config = ModelConfig(
        "llama", vocab, width, hidden, num_layers=layers, num_heads=3, num_kv_heads=1, head_dim=width // 3
    )
    return Model.init(config, jax.random.key(0))


def test_products_of_a_step_against_a_count_by_hand():
    """T = 1,024 tokens; 106,168,320 weights in layers, 28,311,552 in the head, 4,884,480 in factors."""
    products = lora_products(SMOLLM2, 8, 128, 16)
    frozen, factors = 4 * 1024 * (106_168_320 + 28_311_552), 6 * 1024 * 4_884_480
    attention = 6 * 2 * 30 * 8 * 9 * 128 * 128 * 64
    assert sum(p.flops for p in products) == frozen + factors + attention
    assert lora_parameters(SMOLLM2, 16) == 4_884_480


@pytest.mark.optimised
def test_products_of_a_step_against_the_compiler():
    """One layer, since a loop's body is counted once; what the compiler has on top is element-wise."""
    side = Side()
    side.model = small(layers=1, width=192, hidden=384, vocab=512)
    batch, length, rank = 2, 64, 8
    side.batch = {name: jnp.zeros((batch, length), jnp.int32) for name in ("ids", "targets", "positions")}
    side.batch |= {"segment_ids": jnp.ones((batch, length), jnp.int32), "weights": jnp.ones((batch, length))}
    program, about = side._step("lora", rank, 16.0, 1e-4)
    compiled = next(cell.cell_contents for cell in program.__closure__ if hasattr(cell.cell_contents, "cost_analysis"))
    counted = sum(p.flops for p in lora_products(side.model.config, batch, length, rank))
    assert about["parameters"] == lora_parameters(side.model.config, rank)
    assert 0.95 < compiled.cost_analysis()["flops"] / counted < 1.15


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "base"
    model = small()
    save_hf(folder, model, model.params)
    return str(folder)


def test_a_run_without_a_peer_measures_the_rest_and_says_so(base, tmp_path):
    result = run(BenchConfig(base=base, rank=2, batch_size=2, seq_len=7, rounds=2, threads=1))
    record.write(tmp_path / "out.json", result)
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    with_peer = {name for name, value in values.items() if value is None}
    assert with_peer == {
        "tokens_per_second_against_peft",
        "tokens_per_second_against_peft_with_our_malloc",
        "memory_beyond_base_against_peft",
        "qlora_tokens_per_second_against_peft_and_bitsandbytes",
    }
    assert all(value > 0 for name, value in values.items() if name not in with_peer)
    assert all(len(times["all"]) == 2 for times in result["seconds"].values())
    assert result["versions"]["jax"] == jax.__version__
    assert result["config"]["threads"] == 1
    assert len(result["machine"]["load_average"]) == 2
    assert result["memory"]["lora"]["temporary_bytes"] > 0
    rows = {row[0]: row[1:] for row in table(result)}
    assert rows["tokens per second against peft"] == ("not measured", "at least 1.3", "")


def timed(**medians):
    return {name: {"median": value} for name, value in medians.items()}


def test_figures_are_ratios_the_right_way_up():
    seconds = timed(
        lora=2.0, full=4.0, peft=3.0, forward=1.0, **{"forward+lora": 1.2, "features": 1.0, "features+lora": 1}
    )
    memory = {"lora": {"beyond_base_bytes": 3}, "peft": {"beyond_base_bytes": 4}}
    out = figures(BenchConfig(), seconds, {"seconds": 1.0}, memory)
    assert out["tokens_per_second_against_peft"] == {"value": 1.5, "bound": ["least", 1.3], "met": True}
    assert out["lora_step_against_full_step"] == {"value": 0.5, "bound": ["most", 0.7], "met": True}
    assert out["lora_step_against_floor"] == {"value": 2.0, "bound": ["most", 1.6], "met": False}
    assert out["forward_with_adapters_against_without"]["met"] is False
    assert out["memory_beyond_base_against_peft"]["value"] == 0.75
    assert out["tokens_per_second_against_peft_with_our_malloc"] == {"value": None, "bound": None, "met": None}


def test_two_sides_that_compute_different_things_are_not_compared():
    loaded = {"lora": {"threads": 2}, "peft": {"threads": 2}}
    ready = {"lora": {"loss": 3.0, "parameters": 5}, "peft": {"loss": 3.001, "parameters": 5}}
    _same(loaded, ready)
    with pytest.raises(LoraxError, match=r"starts at loss 3\.10000 .*do not compute the same"):
        _same(loaded, {**ready, "peft": {"loss": 3.1, "parameters": 5}})
    with pytest.raises(LoraxError, match="trains 6 parameters and lorax 5"):
        _same(loaded, {**ready, "peft": {"loss": 3.0, "parameters": 6}})
    with pytest.raises(LoraxError, match="1 threads"):
        _same({**loaded, "peft": {"threads": 1}}, ready)


def test_a_worker_that_dies_is_an_error_with_its_last_words():
    with (
        Worker("peer", [sys.executable, "-c", "input(); raise SystemExit('no torch here')"]) as worker,
        pytest.raises(LoraxError, match=r"peer: stopped during .*no torch here"),
    ):
        worker.ask(op="load")
    with pytest.raises(LoraxError, match="does not run"):
        Worker("peer", ["/no/such/python"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"rounds": 0}, "rounds is 0"), ({"seq_len": 1}, "seq_len is 1"), ({"threads": 10_000}, "threads is 10000")],
)
def test_settings_that_measure_nothing_are_refused(setting, message):
    with pytest.raises(LoraxError, match=message):
        run(BenchConfig(**setting))


def test_the_command_line_knows_every_setting():
    import tyro

    args = tyro.cli(Args, args=["train", "--rounds", "3", "--peer-python", "python3", "--json"])
    assert args.config == BenchConfig(rounds=3, peer_python="python3")
    assert args.json


def test_the_batch_has_a_target_for_every_token_but_the_last(base):
    side = Side()
    side.load(base, threads=len(os.sched_getaffinity(0)), batch=3, length=5, seed=1)
    ids, targets, weights = (np.asarray(side.batch[name]) for name in ("ids", "targets", "weights"))
    np.testing.assert_array_equal(targets[:, :-1], ids[:, 1:])
    assert weights.sum() == 3 * 4
