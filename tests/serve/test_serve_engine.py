"""The engine against the model asked alone: mixed adapters, pages, preemption, seeds, the end of a text."""

from __future__ import annotations

import numpy as np
import pytest
from jax import monitoring
from serve_toys import SHAPE, alone, idle, logits, requests, started

from lorax.serve import BadRequest, Busy, Draining, Request, Sampling, UnknownAdapter


def test_a_mixed_batch_answers_as_each_adapter_alone(engine):
    asked = requests(12)
    handles = [engine.submit(request) for request in asked]
    for request, handle in zip(asked, handles, strict=True):
        event = handle.result(60)
        assert event.tokens == alone(request), request.adapter
        assert event.finish == "length"
        assert event.usage.completion_tokens == 8
    assert idle(engine)


def test_logits_are_those_of_lift_within_a_ten_thousandth(engine):
    asked = [Request(r.prompt, r.adapter, 4, Sampling(temperature=0.0, logprobs=20)) for r in requests(8, seed=1)]
    handles = [engine.submit(request) for request in asked]
    for request, handle in zip(asked, handles, strict=True):
        event = handle.result(60)
        ids = list(request.prompt)
        for one in event.logprobs:
            want = logits(request.adapter, ids).astype(np.float64)
            want = want - np.log(np.sum(np.exp(want - want.max()))) - want.max()
            got = dict([*one.top, (one.token, one.logprob)])
            assert len(one.top) == 20
            np.testing.assert_allclose([got[token] for token in got], want[list(got)], atol=1e-4)
            ids.append(one.token)


def test_nothing_is_compiled_under_load(engine):
    seen = []
    watch = lambda name, *_, **__: seen.append(name) if "compile" in name else None  # noqa: E731
    monitoring.register_event_duration_secs_listener(watch)
    everything = Sampling(top_p=0.7, top_k=9, min_p=0.01, repetition_penalty=1.2, logprobs=3)
    asked = [*requests(9, seed=2), Request((5, 6, 7), "one", 5, everything)]
    try:
        for handle in [engine.submit(request) for request in asked]:
            handle.result(60)
    finally:
        monitoring.unregister_event_duration_listener(watch)
    assert seen == []
    assert engine.stats().compilations == 0


def test_a_seed_gives_one_text_whatever_else_is_in_the_batch(engine):
    def asked(seed):
        return Request((3, 1, 4, 1, 5), "two", 12, Sampling(temperature=4.0, top_p=0.95, seed=seed))

    single = [engine.submit(asked(seed)).result(60).tokens for seed in range(4)]
    assert len(set(single)) == 4
    crowd = [engine.submit(request) for request in requests(3, seed=3)]
    again = [engine.submit(asked(seed)) for seed in (2, 0, 3, 1)]
    assert [handle.result(60).tokens for handle in again] == [single[seed] for seed in (2, 0, 3, 1)]
    for handle in crowd:
        handle.result(60)


def test_what_cannot_be_served_is_said_at_once(engine):
    with pytest.raises(UnknownAdapter, match=r"'four'.*one"):
        engine.submit(Request((1,), "four"))
    for wrong in (
        Request(()),
        Request((1,) * 48, max_new_tokens=1),
        Request((SHAPE.vocab_size,)),
        Request((1,), max_new_tokens=0),
        Request((1,), stop=("",)),
        Request((1,), deadline=0.0),
        Request((1,), sampling=Sampling(temperature=float("nan"))),
        Request((1,), sampling=Sampling(top_p=0.0)),
        Request((1,), sampling=Sampling(min_p=1.0)),
        Request((1,), sampling=Sampling(logprobs=21)),
    ):
        with pytest.raises(BadRequest):
            engine.submit(wrong)


def test_stop_tokens_cancelled_requests_and_deadlines(engine):
    request = requests(1, new=12, seed=5)[0]
    answer = alone(request)
    stopped = engine.submit(Request(request.prompt, None, 12, Sampling(temperature=0.0), stop_ids=(answer[3],)))
    event = stopped.result(60)
    assert event.finish == "stop"
    assert event.tokens == answer[: answer.index(answer[3])]
    late = engine.submit(Request((1, 2), max_new_tokens=40, deadline=1e-6)).result(60)
    assert late.finish == "deadline"
    handle = engine.submit(Request((1, 2), max_new_tokens=46))
    handle.cancel()
    handle.cancel()
    assert handle.result(60).finish == "cancelled"
    assert idle(engine)


def test_a_full_pool_preempts_and_gives_the_same_texts(folder):
    with started(folder, pages=68, prefix_cache=False) as small:
        asked = requests(10, new=20, seed=6)
        got = [handle.result(60) for handle in [small.submit(request) for request in asked]]
        assert [event.tokens for event in got] == [alone(request) for request in asked]
        stats = small.stats()
        assert stats.preemptions > 0
        assert stats.evictions_device > 0
        assert idle(small)
        assert stats.pages_free + stats.pages_adapters == stats.pages
        assert small.drain(10)
        with pytest.raises(Draining):
            small.submit(asked[0])


def test_a_full_queue_says_when_to_come_back(folder):
    long = Request((1, 2), max_new_tokens=40)
    with started(folder, max_queue=1) as small:
        handles, refused = [], []
        for _ in range(12):
            try:
                handles.append(small.submit(long))
            except Busy as error:
                refused.append(error)
        assert refused
        assert all(error.retry_after >= 1 for error in refused)
        assert small.stats().refused == len(refused)
        assert all(handle.result(60).finish == "length" for handle in handles)
