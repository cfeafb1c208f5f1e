"""Adapters on device, host and disk: moved by use, never while in use, restored after a kill, refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import pytest
from serve_toys import LENGTH, SHAPE, adapters, alone, config, idle, model, requests, started

import lorax
from lorax.models import Model
from lorax.serve import AdapterError, Engine, Request, Sampling, UnknownAdapter

GREEDY = Sampling(temperature=0.0)


def ask(engine, name, new=6):
    request = Request((5, 3, 1), name, new, GREEDY)
    return request, engine.submit(request)


def test_tiers_follow_use_and_answers_do_not_change(folder, tmp_path):
    kept = tmp_path / "state"
    with started(folder, pool_adapters=1, host_bytes=0, state=str(kept)) as engine:
        # Nothing fits in host memory beside the one that came last.
        assert [info.tier for info in engine.adapters()] == ["disk", "disk", "host"]
        asked = [ask(engine, name) for name in ("one", "two", "three", "one")]
        for request, handle in asked:
            event = handle.result(60)
            assert event.finish == "length"
            assert event.tokens == alone(request)
        stats = engine.stats()
        assert stats.loads_disk >= 3
        assert stats.loads_device >= 3
        assert stats.evictions_device >= 2
        assert stats.evictions_host >= 2
        assert sum(info.tier == "device" for info in engine.adapters()) == 1
        assert idle(engine)
        held = engine.store.find("one").digest
    # Another process, as after a kill: it has what was registered, and reads it when asked.
    with Engine(model(), config(state=str(kept))) as engine:
        engine.start()
        assert {info.name: info.tier for info in engine.adapters()} == dict.fromkeys(adapters(), "disk")
        assert engine.adapter("one").digest == held
        request, handle = ask(engine, "two")
        assert handle.result(60).tokens == alone(request)
        engine.unload("two")
        with pytest.raises(UnknownAdapter):
            engine.submit(request)
    assert {row["name"] for row in json.loads((kept / "adapters.json").read_text())["adapters"]} == {"one", "three"}


def test_a_name_that_is_replaced_or_removed_ends_what_runs_as_it_began(engine, folder):
    engine.load("mine", folder / "one")
    engine.load("theirs", folder / "two")
    ask_long = lambda name: engine.submit(Request((5, 3, 1), name, 30, GREEDY))  # noqa: E731
    first, second = (alone(Request((5, 3, 1), name, 30, GREEDY)) for name in ("one", "two"))
    assert first != second
    before = ask_long("mine")
    next(iter(before))
    info = engine.load("mine", folder / "two", replace=True)
    assert info.digest == engine.adapter("two").digest != engine.adapter("one").digest
    # The same prompt under the same name: pages that the old weights filled are not for the new ones.
    after = ask_long("mine")
    assert before.result(60).tokens == first[1:]
    assert after.result(60).tokens == second
    running = ask_long("theirs")
    engine.unload("theirs")
    assert running.result(60).tokens == second
    with pytest.raises(UnknownAdapter):
        ask_long("theirs")
    with pytest.raises(AdapterError) as taken:
        engine.load("mine", folder / "two")
    assert taken.value.reason == "exists"
    engine.unload("mine")
    assert idle(engine)


def test_the_prefix_cache_never_gives_one_adapters_pages_to_another(engine):
    """Every adapter and the base read one prompt; with shared pages the later ones would answer as the first."""
    prompt = tuple(range(1, 18))
    asked = [Request(prompt, name, 6, GREEDY) for name in (None, *adapters())]
    wanted = [alone(request) for request in asked]
    assert len(set(wanted)) == len(wanted)
    before = engine.stats()
    for _ in range(2):
        for request, answer in zip(asked, wanted, strict=True):
            assert engine.submit(request).result(60).tokens == answer
    stats = engine.stats()
    assert stats.prefix_hits - before.prefix_hits == 4 * 2
    assert stats.cached_tokens - before.cached_tokens == 4 * 12


def test_what_cannot_be_loaded_says_why_and_harms_nobody(engine, folder, tmp_path):
    def broken(name, change):
        shutil.copytree(folder / "one", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    weights = "adapter_model.safetensors"
    cut = broken("cut", lambda path: (path / weights).write_bytes((path / weights).read_bytes()[:200]))
    torn = broken("torn", lambda path: (path / "adapter_config.json").write_text("{"))
    other = Model.init(dataclasses.replace(SHAPE, hidden_size=16), jax.random.key(0))
    adapted = lorax.adapt(jax.random.key(0), other.params, lorax.LoraSpec(targets="*q_proj*", rank=2))
    lorax.save_adapter(tmp_path / "other", adapted)
    changed = jax.tree.map(lambda x: x + 1, model().params)
    lorax.save_adapter(
        tmp_path / "changed", lorax.adapt(jax.random.key(0), changed, lorax.LoraSpec(targets="*q_proj*", rank=2))
    )
    spec = lorax.LoraSpec(targets="*down_proj*", rank=13)
    lorax.save_adapter(tmp_path / "high", lorax.adapt(jax.random.key(0), model().params, spec))
    spec = lorax.LoraSpec(targets="*q_proj*", rank=2, variant="dora")
    lorax.save_adapter(tmp_path / "dora", lorax.adapt(jax.random.key(0), model().params, spec))
    spec = lorax.LoraSpec(targets="*embedding*", rank=2)
    lorax.save_adapter(tmp_path / "embedding", lorax.adapt(jax.random.key(0), model().params, spec))
    spec = lorax.LoraSpec(targets="*q_proj*", rank=2)
    endless = lorax.adapt(jax.random.key(0), model().params, spec)
    endless = jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.inf) if x.ndim == 3 else x, lorax.extract(endless))
    lorax.save_adapter(tmp_path / "endless", endless)
    reasons = {
        tmp_path / "endless": "corrupt",
        tmp_path / "none": "missing",
        cut: "corrupt",
        torn: "corrupt",
        tmp_path / "other": "wrong_base",
        tmp_path / "changed": "wrong_base",
        tmp_path / "high": "too_large",
        tmp_path / "dora": "unsupported",
        tmp_path / "embedding": "unsupported",
    }
    request, handle = ask(engine, "one", 40)
    for path, reason in reasons.items():
        with pytest.raises(AdapterError) as refused:
            engine.load("new", path)
        assert refused.value.reason == reason, refused.value
        assert "\n" not in str(refused.value)
    assert {info.name for info in engine.adapters()} == set(adapters())
    assert handle.result(60).tokens == alone(request)


def test_a_disk_that_is_gone_fails_those_who_need_it_alone(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "one")
    with Engine(model(), config(host_bytes=0)) as engine:
        engine.load("lost", tmp_path / "one")
        engine.load("two", folder / "two")
        engine.start()
        shutil.rmtree(tmp_path / "one")
        _, lost = ask(engine, "lost")
        request, fine = ask(engine, "two")
        event = lost.result(60)
        assert event.finish == "error"
        assert "no adapter" in event.error
        assert fine.result(60).tokens == alone(request)
        # It is there again, and what it is changed.
        shutil.copytree(folder / "three", tmp_path / "one")
        assert "changed since" in ask(engine, "lost")[1].result(60).error
        shutil.rmtree(tmp_path / "one")
        shutil.copytree(folder / "one", tmp_path / "one")
        assert ask(engine, "lost")[1].result(60).tokens == alone(Request((5, 3, 1), "one", 6, GREEDY))
        assert idle(engine)


def test_reading_from_the_disk_holds_up_nobody_who_runs(engine, folder, monkeypatch):
    engine.load("slow", folder / "three")
    store, go = engine.store, threading.Event()
    with store._lock:
        store._drop_host(store.find("slow"))
    assert engine.adapter("slow").tier == "disk"
    read = store._read
    monkeypatch.setattr(store, "_read", lambda *args, **kwargs: go.wait(60) and read(*args, **kwargs))
    waiting = engine.submit(Request((5, 3, 1), "slow", 6, GREEDY))
    request, running = ask(engine, "one", 30)
    assert running.result(60).tokens == alone(request)
    assert engine.stats().waiting == 1
    go.set()
    event = waiting.result(60)
    assert event.tokens == alone(Request((5, 3, 1), "three", 6, GREEDY))
    assert 0 < event.usage.adapter_wait <= event.usage.queued
    engine.unload("slow")
    assert idle(engine)


def test_one_adapter_merged_is_the_whole_deployment(folder):
    with Engine(model(), config(only=str(folder / "one"))) as engine:
        engine.start()
        request = Request((5, 3, 1), "one", 8, GREEDY)
        assert engine.submit(request).result(60).tokens == alone(request)
        with pytest.raises(UnknownAdapter, match="one"):
            engine.submit(dataclasses.replace(request, adapter="two"))


def test_devices_share_the_layers(folder):
    """Two devices: heads, MLP and adapters in parts, answers as on one."""
    with started(folder, tensor_parallel=2) as engine:
        assert engine.programs.pool.shape[0] == 2
        assert len(engine.programs.pool.sharding.device_set) == 2
        asked = requests(6, new=6, seed=9)
        for request, handle in [(request, engine.submit(request)) for request in asked]:
            assert handle.result(60).tokens == alone(request)


def test_a_quantised_base_serves_the_same_adapters(folder):
    from lorax import quantize

    packed = dataclasses.replace(model(), params=quantize(model().params, targets="*proj*", double_quant=False))
    tree = lorax.attach(packed.params, lorax.extract(adapters()["one"]))
    with Engine(packed, config(max_batch=1)) as engine:
        engine.load("one", folder / "one")
        engine.start()
        event = engine.submit(Request((5, 3, 1), "one", 5, Sampling(temperature=0.0, logprobs=1))).result(60)
    ids = [5, 3, 1, *event.tokens]
    out = jax.jit(lorax.lift(model().apply))(tree, jnp.asarray([ids]))
    wanted = jax.nn.log_softmax(out[0], axis=-1)
    for i, one in enumerate(event.logprobs):
        assert abs(float(wanted[2 + i, one.token]) - one.logprob) < 1e-4
    assert len(ids) <= LENGTH
