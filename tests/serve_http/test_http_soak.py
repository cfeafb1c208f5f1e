"""Two minutes of 64 clients on the real server process: 200 adapters of mixed rank, 20 in the pool, and trouble.

All at once: cancels, adapters that are loaded, replaced and taken out, requests that are wrong, slow clients, and an
adapter whose files disappear. Every completed answer is the one that the same request gets alone.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time

import pytest
from http_site import until
from process import alone, load, running
from tiny import save_adapter, save_base

from lorax.serve.http import keys

pytestmark = pytest.mark.serve

SECONDS = 125
RANKS = (1, 2, 3, 4, 6, 8, 12, 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    save_base(folder / "base")
    for i in range(200):
        save_adapter(folder / "adapters" / f"a{i}", i, RANKS[i % len(RANKS)])
    # Two versions of one name: which of them answers depends on the moment, and no third thing may.
    for version in (0, 1):
        save_adapter(folder / "adapters" / f"moving-{version}", 900 + version, 4)
    return folder


def words(place, *more):
    sizes = ["--max-batch", "16", "--max-length", "96", "--max-rank", "16", "--chunk", "16", "--page-tokens", "8"]
    pool = ["--pool-adapters", "20", "--pool-mb", "2", "--host-mb", "1", "--max-queue", "256"]
    times = ["--header-timeout", "2", "--body-timeout", "2"]
    adapters = ["--adapters", str(place / "adapters")]
    return ["--base", str(place / "base"), "--name", "tiny", *adapters, *sizes, *pool, *times, *more]


class Trouble(threading.Thread):
    """Something that happens again and again while others are served; what it finds wrong is raised at the end."""

    def __init__(self, once, pause):
        super().__init__(daemon=True)
        self._once, self._pause, self._end, self.rounds, self.error = once, pause, threading.Event(), 0, None

    def run(self):
        try:
            while not self._end.wait(self._pause):
                self._once(self.rounds)
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def end(self):
        self._end.set()
        self.join(60)
        if self.error is not None:
            raise self.error


def replacing(server):
    def once(round):
        body = {"lora_name": "moving", "lora_path": f"moving-{round % 2}", "load_inplace": True}
        assert server.change("load", **body).status_code == 200

    return once


def coming_and_going(server):
    """A name is there, and is not: who asks for it gets its answer or a 404."""

    def once(round):
        if round % 2:
            assert server.change("unload", lora_name="guest").status_code == 200
        else:
            assert server.change("load", lora_name="guest", lora_path="a7").status_code == 200

    return once


def wrong_requests(server, secret):
    """Each kind of bad request, and the status that it must get."""
    json_type = {"Content-Type": "application/json"}
    cases = [
        ({"json": {"model": "nobody", "prompt": "x"}}, 404),
        ({"json": {"model": "a1", "prompt": "x" * 10_000_000}}, 413),
        ({"json": {"model": "a1", "prompt": "x" * 5000}}, 400),
        ({"json": {"model": "a1", "prompt": "x", "temperature": -1}}, 400),
        ({"content": b'{"model": ', "headers": json_type}, 400),
        ({"content": b"\x00\xff", "headers": json_type}, 400),
        ({"content": b"x"}, 415),
    ]

    def once(round):
        what, status = cases[round % len(cases)]
        assert server.http.post("/v1/completions", **what).status_code == status, what.get("json", {}).get("model")

    return once


def slow_clients(server):
    host, port = server.url.removeprefix("http://").split(":")

    def once(round):
        """Five heads that never end; the server ends each after two seconds."""
        open_ones = [socket.create_connection((host, int(port)), timeout=10) for _ in range(5)]
        for s in open_ones:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        for s in open_ones:
            assert b" 408 " in s.recv(4096)
            s.close()

    return once


def test_two_minutes_of_everything(place):
    rng = random.Random(5)
    requests = [
        {
            "model": f"a{i}",
            "prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(3, 50))),
            "max_tokens": rng.randint(4, 40),
            "temperature": rng.choice([0.0, 0.8]),
            "top_p": rng.choice([1.0, 0.9]),
            "seed": i,
        }
        for i in range(200)
        for _ in range(2)
    ]
    requests += [{"model": "tiny", "prompt": f"base {i}", "max_tokens": 30, "temperature": 0.0} for i in range(10)]
    moving = [{"model": "moving", "prompt": f"moves {i}", "max_tokens": 20, "temperature": 0.0} for i in range(8)]
    guest = [{"model": "guest", "prompt": f"guest {i}", "max_tokens": 20, "temperature": 0.0} for i in range(8)]
    with running(words(place), place / "cache") as server:
        assert len(server.adapters()) == 202
        assert server.change("load", lora_name="moving", lora_path="moving-0").status_code == 200
        troubles = [
            Trouble(replacing(server), 0.7),
            Trouble(coming_and_going(server), 0.9),
            Trouble(wrong_requests(server, None), 0.4),
            Trouble(slow_clients(server), 1.0),
        ]
        for trouble in troubles:
            trouble.start()
        every = requests + moving * 4 + guest * 4
        # The first part warms up whatever grows once; from then on memory stays where it is.
        first = load(server.url, every, clients=64, seconds=SECONDS * 0.3, cancels=0.2, seed=1)
        warm = server.memory()
        second = load(server.url, every, clients=64, seconds=SECONDS * 0.7, cancels=0.2, seed=2)
        grown = server.memory() - warm
        for trouble in troubles:
            trouble.end()
        until(lambda: server.metrics()["lorax_running_requests"] + server.metrics()["lorax_queue_requests"] == 0)
        figures = server.metrics()

        answers: dict[str, set[str]] = {}
        for done in (first, second):
            for request, texts in done.answers.items():
                answers.setdefault(request, set()).update(texts)
            # A guest that was away is the one thing that may fail.
            assert {(json.loads(r)["model"], status) for r, status, _ in done.failed} <= {("guest", 404)}
        completed = first.completed + second.completed
        print(f"{completed} answers, {first.cancelled + second.cancelled} cancelled, memory {grown >> 20:+d} MiB")
        print({name: int(value) for name, value in figures.items() if "adapter_" not in name or "loads" in name})
        assert completed > 1000
        assert first.cancelled + second.cancelled > 200
        assert server.change("load", lora_name="guest", lora_path="a7", load_inplace=True).status_code == 200
        for request, texts in answers.items():
            name = json.loads(request)["model"]
            if name != "moving":
                assert texts == {alone(server.http, request)}, request
                continue
            versions = [request.replace('"moving"', f'"moving-{version}"') for version in (0, 1)]
            assert texts <= {alone(server.http, version) for version in versions}, request
        moved = [texts for request, texts in answers.items() if '"moving"' in request]
        assert any(len(texts) == 2 for texts in moved), "no replacement was ever seen"

        # No page is lost: with nobody there, pages hold the prefix cache, adapters, or nothing.
        figures = server.metrics()
        assert figures['lorax_pages{holds="kv"}'] == 0
        assert figures["lorax_compilations_total"] == 0
        assert figures['lorax_adapter_evictions_total{tier="device"}'] > 100
        assert figures['lorax_adapter_loads_total{source="disk"}'] > 100
        assert grown < 48 << 20, f"memory grew by {grown >> 20} MiB"
        assert [line for line in server.log if line["level"] == "error"] == []
        assert all(trouble.rounds > 20 for trouble in troubles)
        assert server.stop() == 0


def test_a_disk_that_goes_away_harms_those_alone_who_need_it(place, tmp_path):
    """Adapters in neither pool nor memory whose files vanish: a clear 503, for them; the others go on."""
    folder = tmp_path / "adapters"
    for i in range(40):
        save_adapter(folder / f"b{i}", i, 16)
    more = ["--adapters", str(folder), "--state", str(tmp_path / "state"), "--pool-adapters", "4", "--host-mb", "0"]
    with running(words(place)[:-2] + more, place / "cache") as server:
        ask = {"prompt": "still here", "max_tokens": 20, "temperature": 0.0}
        right = alone(server.http, json.dumps(ask | {"model": "b0"}))
        for i in range(1, 40):
            alone(server.http, json.dumps(ask | {"model": f"b{i}"}))
        shutil.rmtree(folder / "b0")
        found, end = [], time.monotonic() + 5
        others = {f"b{i}": alone(server.http, json.dumps(ask | {"model": f"b{i}"})) for i in range(5, 12)}
        while time.monotonic() < end:
            for stream in (False, True):
                reply = server.http.post("/v1/completions", json=ask | {"model": "b0", "stream": stream})
                found.append(reply.status_code)
                assert reply.status_code in (200, 503), reply.text
                if reply.status_code == 503:
                    assert "b0" in reply.json()["error"]["message"]
            for name, text in others.items():
                assert alone(server.http, json.dumps(ask | {"model": name})) == text
        assert 503 in found
        # It comes back, and so does its answer.
        save_adapter(folder / "b0", 0, 16)
        assert alone(server.http, json.dumps(ask | {"model": "b0"})) == right


def test_tenants_under_load(place, tmp_path):
    """Keys that each may use their own adapter: nobody gets another's, however busy the server is."""
    file = tmp_path / "keys.json"
    secrets = {name: keys.add(file, name, [name]) for name in ("a1", "a2")}
    with running(words(place, "--keys", str(file)), place / "cache") as server:

        def ask(who, model):
            head = {"Authorization": f"Bearer {secrets.get(who, who)}"}
            body = {"model": model, "prompt": "mine", "max_tokens": 10, "temperature": 0.0}
            return server.http.post("/v1/completions", json=body, headers=head)

        texts = {who: ask(who, who).json()["choices"][0]["text"] for who in secrets}
        assert texts["a1"] != texts["a2"]
        for _ in range(20):
            for who, other in (("a1", "a2"), ("a2", "a1")):
                assert ask(who, who).json()["choices"][0]["text"] == texts[who]
                assert ask(who, other).status_code == 403
                assert ask("wrong", who).status_code == 401
