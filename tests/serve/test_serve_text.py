"""Text as it comes: whole characters, never a part of a stop string, the same as the tokenizer gives for all tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading

import numpy as np
import pytest
import tokenizers
from serve_toys import SHAPE, alone, idle, requests, started

from lorax.models.tokenizer import Tokenizer
from lorax.serve import Request, Sampling
from lorax.serve.text import TextStream


def byte_tokenizer():
    """A token for each byte, so that most characters take several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(inner)


TEXT = "Grüße, 世界! 🙂 a long enough line for the window to move on — and on."


def pieces(text, stops=(), prompt="ß"):
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stops)
    out = []
    for token in tokenizer.encode(text):
        out.append(stream.add(token))
        if stream.stopped:
            break
    return [*out, stream.end()], stream.stopped


def test_characters_come_whole():
    got, stopped = pieces(TEXT)
    assert "".join(got) == TEXT
    assert not stopped
    assert all("�" not in piece for piece in got)
    assert max(map(len, got)) == 1


@pytest.mark.parametrize("stops", [("on",), ("line",), ("nowhere", "🙂"), ("h li", "h l"), ("界!",)])
def test_the_text_ends_before_the_first_stop(stops):
    got, stopped = pieces(TEXT, stops)
    assert "".join(got) == TEXT[: min(TEXT.index(stop) for stop in stops if stop in TEXT)]
    assert stopped


def test_what_may_become_a_stop_is_held_back_and_given_in_the_end():
    got, stopped = pieces("ab##", ("###",))
    assert got == ["a", "b", "", "", "##"]
    assert not stopped
    got, _ = pieces("a#b##c", ("##",))
    assert got[:4] == ["a", "", "#b", ""]
    assert "".join(got) == "a#b"


def test_bytes_that_are_no_character_do_not_hold_the_text_up():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, [], ())
    (bad,) = tokenizer.inner.encode("ß").ids[:1]
    got = [stream.add(bad) for _ in range(20)]
    assert "�" in "".join(got)


def test_a_stop_string_ends_a_request(engine):
    request = requests(1, new=12, seed=5)[0]
    answer = alone(request)
    whole = engine.submit(request).result(60)
    assert whole.text.split() == [f"w{token}" for token in answer]
    stop = f"w{answer[4]}"
    event = engine.submit(dataclasses.replace(request, stop=(stop,))).result(60)
    assert event.finish == "stop"
    assert event.text == whole.text[: whole.text.index(stop)]
    assert idle(engine)


def test_many_threads_that_come_and_go(folder):
    """Clients of their own threads, some of which leave: every answer that ends is the one given alone."""
    asked = requests(6, new=10, seed=4)
    wanted = [alone(request) for request in asked]
    wrong = []
    with started(folder, pages=75) as engine:

        def client(seed):
            draw = random.Random(seed)
            for _ in range(12):
                which = draw.randrange(len(asked))
                handle = engine.submit(dataclasses.replace(asked[which], tenant=str(seed % 3)))
                if draw.random() < 0.3:
                    stop_at, got = draw.randrange(10), 0
                    for event in handle:
                        got += len(event.tokens)
                        if got >= stop_at:
                            handle.cancel()
                    continue
                event = handle.result(60)
                if event.tokens != wanted[which]:
                    wrong.append((which, event))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        stats = engine.stats()
        assert stats.finished["cancelled"] > 0
        assert sum(stats.finished.values()) == 12 * 12
        assert idle(engine)
        assert stats.pages_free + stats.pages_adapters + stats.pages_cached == stats.pages
        assert not stats.tenants
        assert all(info.in_use == 0 for info in engine.adapters())


def test_draws_differ_and_a_told_seed_repeats_them(engine):
    many = [engine.submit(Request((1, 2), max_new_tokens=4, sampling=Sampling(seed=i))) for i in range(6)]
    tokens = [handle.result(60).tokens for handle in many]
    assert len(set(tokens)) > 1
    assert np.all((np.array(tokens) >= 0) & (np.array(tokens) < SHAPE.vocab_size))
    drawn = engine.submit(Request((1, 2), max_new_tokens=4))
    again = Request((1, 2), max_new_tokens=4, sampling=Sampling(seed=drawn.seed))
    assert drawn.result(60).tokens == engine.submit(again).result(60).tokens


def test_an_event_loop_takes_events_as_they_come(engine):
    asked = requests(3, new=6, seed=8)

    async def one(request):
        handle = engine.submit(request)
        events = [event async for event in handle]
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
        return tuple(token for event in events for token in event.tokens)

    async def everything():
        streams = await asyncio.gather(*map(one, asked))
        return streams, await engine.submit(asked[0]).wait()

    streams, whole = asyncio.run(everything())
    assert streams == [alone(request) for request in asked]
    assert whole.tokens == streams[0]
    assert whole.usage.completion_tokens == 6
