"""The bench of the server: a small run of all its parts, what it draws, and what its figures compare."""

from __future__ import annotations

import doctest
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lorax import LoraxError
from lorax.bench import serve_load
from lorax.bench.command import Args
from lorax.bench.serve import PARTS, ServeConfig, figures, merged, run
from lorax.bench.serve_load import Workload, draw, summary
from lorax.bench.serve_worker import RANKS, full_batch
from lorax.bench.train_step import BenchConfig
from lorax.models import Model, ModelConfig, save_hf


@pytest.mark.serve
def test_a_run_without_a_peer(tmp_path):
    shape = ModelConfig("llama", 31, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8)
    model = Model.init(shape, jax.random.key(0))
    save_hf(tmp_path / "base", model, model.params)
    sizes = {"batch": 4, "prompt": 5, "answer": 6, "tenants": 2, "counts": (3, 7), "pool": 2, "requests": 12}
    times = {"arrivals": 8, "rate": 100.0, "rounds": 1, "pool_mb": 4, "threads": 1}
    config = ServeConfig(base=str(tmp_path / "base"), folder=str(tmp_path / "made"), **sizes, **times)
    result = run(config)
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert {name for name, value in values.items() if value is None} == {"decoding_2_adapters_against_PEFT"}
    together, stream, arrive = (result["parts"][name] for name in ("together", "stream", "arrive"))
    assert together["base"]["generated_tokens"] == together["all"]["generated_tokens"] == 4 * 6
    assert together["attention"]["loads_device"] == 0
    assert together["base"]["compilations"] == 0
    # A pool of two: seven adapters do not stay in it.
    assert stream["7 adapters"]["loads_device"] > stream["base"]["loads_device"] == 0
    assert stream["merging"]["swaps"] > 2
    assert 0 < stream["merging"]["merging"] < stream["merging"]["seconds"]
    assert set(arrive) == {
        f"{kind}, {n}" for kind in ("Poisson", "bursty") for n in ("base", "3 adapters", "7 adapters")
    }
    assert all(0 <= row["slo_attainment"] <= 1 for row in arrive.values())
    cold = result["parts"]["cold"]
    assert cold["disk"]["median"] > 0
    assert json.loads(json.dumps(result))["figures"] == result["figures"]


def test_workloads():
    assert not doctest.testmod(serve_load).failed
    base = Workload(requests=4000, rate=5.0, adapters=0)
    many = draw(Workload(requests=4000, rate=5.0, adapters=100, alpha=1.0), 50)
    alone = draw(base, 50)
    # The same work at the same times, whoever it is for.
    assert [(a.at, a.prompt, a.answer) for a in many] == [(a.at, a.prompt, a.answer) for a in alone]
    assert {a.adapter for a in alone} == {None}
    gaps = np.diff([a.at for a in many])
    assert abs(gaps.mean() * 5 - 1) < 0.1
    assert abs(gaps.std() / gaps.mean() - 1) < 0.1
    bursty = np.diff([a.at for a in draw(Workload(requests=4000, rate=5.0, cv=4.0), 50)])
    assert abs(bursty.std() / bursty.mean() - 4) < 0.8
    counts = np.bincount([a.adapter for a in many], minlength=100)
    weights = 1 / np.arange(1, 101)
    assert abs(counts[0] / 4000 - weights[0] / weights.sum()) < 0.02
    assert abs(counts[:10].sum() / 4000 - weights[:10].sum() / weights.sum()) < 0.03
    assert {len(a.prompt) for a in many} == set(range(8, 65))
    batch = full_batch(3, 7, 5, 6, 0, 50)
    assert [a.adapter for a in batch] == [0, 1, 2, 0, 1, 2, 0]
    assert len({a.prompt for a in batch}) == 7


def test_summaries():
    usages = [SimpleNamespace(first_token=0.1 * i, total=0.1 * i + 0.9, completion_tokens=10) for i in range(1, 11)]
    found = summary(2.0, usages, slo_first=0.55, slo_each=0.11)
    assert found["requests_per_second"] == 5.0
    assert found["tokens_per_second"] == 50.0
    assert found["slo_attainment"] == 0.5
    assert found["first_token"]["p50"] == pytest.approx(0.55)
    assert found["time_per_token"]["p99"] == pytest.approx(0.1)
    assert summary(2.0, usages, slo_first=9.0, slo_each=0.05)["slo_attainment"] == 0.0


def test_figures_are_the_right_way_up():
    def row(speed, share=0.01):
        return {"tokens_per_second": speed, "decode_tokens_per_second": 2 * speed, "host_share": share}

    parts = {
        "together": {"base": row(100.0), "attention": row(90.0), "all": row(50.0, 0.06), "tenants": row(80.0)},
        "cold": {"device": {"median": 0.1}, "host": {"median": 0.2}, "disk": {"median": 0.55}},
        "stream": {"1000 adapters": row(90.0), "5 adapters": row(100.0), "2000 adapters": row(80.0)},
    }
    parts["together"]["PEFT"] = {"tokens_per_second": 10.0, "decode_tokens_per_second": 32.0}
    parts["stream"]["merging"] = {"tokens_per_second": 20.0}
    found = figures(parts, ServeConfig())
    assert {name: (f["value"], f["met"]) for name, f in found.items()} == {
        "32_adapters_against_the_base": (0.9, True),
        "32_adapters_on_every_map_against_the_base": (0.5, False),
        "1000_adapters_against_5_adapters": (0.9, False),
        "decoding_8_adapters_against_PEFT": (5.0, True),
        "scheduling_and_paging_part_of_a_step": (0.06, False),
        "cold_from_host_ms_above_warm": (100.0, True),
        "cold_from_disk_ms_above_warm": (450.0, False),
        "many_adapters_against_merging": (4.0, True),
    }
    assert all(f["value"] is None for f in figures({}, ServeConfig()).values())


def test_a_result_keeps_the_parts_that_a_later_run_leaves_out():
    machine = {"processor": "p", "cores": 2}
    about = {"bench": "serve", "machine": machine, "versions": {"jax": "1"}, "config": {"batch": 32}}
    cold = {"device": {"median": 0.1}, "host": {"median": 0.2}, "disk": {"median": 0.5}}
    old = {**about, "parts": {"cold": cold, "together": {}}}
    new = {**about, "versions": {"torch": "2"}, "parts": {"together": {"base": {"host_share": 0.02}}}}
    found = merged(old, new)
    assert set(found["parts"]) == {"cold", "together"}
    assert found["figures"]["cold_from_host_ms_above_warm"]["met"]
    assert found["figures"]["scheduling_and_paging_part_of_a_step"]["value"] == 0.02
    assert found["versions"] == {"jax": "1", "torch": "2"}
    with pytest.raises(LoraxError, match="another machine"):
        merged({**old, "machine": {"processor": "q", "cores": 2}}, new)


def test_settings():
    with pytest.raises(LoraxError, match="at least 1"):
        run(ServeConfig(tenants=0))
    with pytest.raises(LoraxError, match="no part nothing"):
        run(ServeConfig(parts=("nothing",)))
    args = Args("serve", BenchConfig(rounds=2, peer_python="python", batch_size=4, seq_len=9), serve_parts=("cold",))
    assert args._serve() == ServeConfig(parts=("cold",), rounds=2, peer_python="python", batch=4, answer=9)
    assert Args("serve").serve_parts == PARTS
    assert len(RANKS) == 3
