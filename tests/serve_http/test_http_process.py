"""The real server process with a tiny base: what it answers, what it survives. The long version: test_http_soak."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest
from http_site import until
from process import alone, load, running
from tiny import save_adapter, save_base

import lorax
from lorax.models import generate
from lorax.models import load as load_model

RANKS = (1, 2, 4, 8, 3, 5)
SMALL = ["--max-batch", "4", "--max-length", "64", "--pool-mb", "1", "--max-rank", "8", "--chunk", "16"]
SMALL += ["--page-tokens", "8", "--pool-adapters", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, adapters of mixed rank, and a cache that the servers of this file share."""
    folder = tmp_path_factory.mktemp("serve")
    save_base(folder / "base")
    for i, rank in enumerate(RANKS):
        save_adapter(folder / "adapters" / f"a{i}", i, rank)
    return folder


def words(place, *more):
    return ["--base", str(place / "base"), "--name", "tiny", "--adapters", str(place / "adapters"), *SMALL, *more]


@pytest.fixture(scope="module")
def server(place):
    with running(words(place), place / "cache") as found:
        yield found
        assert found.stop() == 0


def test_answers_are_those_of_the_model_with_that_adapter(server, place):
    """Through the official client, against `generate` over the adapter loaded by itself."""
    model = load_model(place / "base")
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    prompt = "the parties agree"
    ids = model.tokenizer.encode(prompt)
    for name in (None, "a0", "a3"):
        params = model.params if name is None else lorax.load_adapter(place / "adapters" / name, model.params)
        (tokens,) = generate(model, params, [ids], 12)
        ask = {"model": name or "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        done = api.completions.create(**ask)
        assert done.choices[0].text == model.tokenizer.decode(tokens), name
        assert done.usage.prompt_tokens == len(ids)
        parts = api.completions.create(**ask, stream=True)
        assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    talk = [{"role": "user", "content": "hi"}]
    said = api.chat.completions.create(model="a1", messages=talk, max_tokens=8, temperature=0, logprobs=True)
    params = lorax.load_adapter(place / "adapters" / "a1", model.params)
    (tokens,) = generate(model, params, [model.tokenizer.encode_chat(talk)], 8)
    assert said.choices[0].message.content == model.tokenizer.decode(tokens)
    assert all(row.logprob <= 0 for row in said.choices[0].logprobs.content)


def test_many_clients_with_cancels_get_what_each_gets_alone(server):
    """More adapters than the pool holds, greedy and drawn, whole and streamed; nothing is left behind."""
    requests = [
        {"model": f"a{i}" if i < 6 else "tiny", "prompt": f"case {i} {j}", "max_tokens": 6 + 5 * j, "seed": j}
        | {"temperature": 0.0 if j else 0.9}
        for i in range(7)
        for j in range(3)
    ]
    before = server.metrics()
    done = load(server.url, requests, clients=12, seconds=4, cancels=0.3)
    assert not done.failed
    assert done.completed > 20
    assert done.cancelled > 5
    for request, texts in done.answers.items():
        assert set(texts) == {alone(server.http, request)}, request
    until(lambda: server.metrics()["lorax_running_requests"] == 0)
    after = server.metrics()
    assert after['lorax_pages{holds="kv"}'] == 0
    assert sum(v for k, v in after.items() if k.startswith("lorax_pages")) == sum(
        v for k, v in before.items() if k.startswith("lorax_pages")
    )
    assert after["lorax_compilations_total"] == 0
    assert after['lorax_adapter_evictions_total{tier="device"}'] > 0


def test_what_is_wrong_is_refused_while_others_are_served(server, place, tmp_path):
    """Adapters that cannot be served, each with its status and a message; an answer that runs meanwhile is unharmed."""
    adapters = place / "adapters"
    request = json.dumps({"model": "a2", "prompt": "meanwhile", "max_tokens": 50, "temperature": 0})
    right = alone(server.http, request)
    answers, end = [], threading.Event()

    def ask():
        while not end.is_set():
            answers.append(alone(server.http, request))

    others = threading.Thread(target=ask)
    others.start()
    try:
        save_adapter(adapters / "bad" / "corrupt", 1, 2)
        file = adapters / "bad" / "corrupt" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        save_adapter(adapters / "bad" / "other-base", 1, 2, dim=40)
        save_adapter(adapters / "bad" / "deeper", 1, 2, layers=5)
        save_adapter(adapters / "bad" / "rank", 1, 9)
        (save_adapter(adapters / "bad" / "no-config", 1, 2) / "adapter_config.json").write_text("{")
        for name, status, part in (
            ("corrupt", 400, "corrupt"),
            ("other-base", 400, "other-base"),
            ("deeper", 400, "deeper"),
            ("rank", 400, "9"),
            ("no-config", 400, "adapter_config.json"),
            ("nowhere", 404, "nowhere"),
        ):
            reply = server.change("load", lora_name="bad", lora_path=f"bad/{name}")
            assert reply.status_code == status, (name, reply.text)
            assert part in reply.json()["error"]["message"], reply.text
        assert server.change("load", lora_name="a0", lora_path="a0").status_code == 409
        assert server.change("unload", lora_name="nobody").status_code == 404
        big = {"model": "a0", "prompt": "x" * 10_000_000}
        assert server.http.post("/v1/completions", json=big).status_code == 413
        assert server.http.post("/v1/completions", json=big | {"model": "no", "prompt": "x"}).status_code == 404
    finally:
        end.set()
        others.join(30)
    assert answers
    assert set(answers) == {right}


def test_kill_and_restart_restore_what_was_loaded(place, tmp_path):
    """Loaded, replaced and unloaded by calls; the process dies without a word; the next one has the same set."""
    adapters = place / "adapters"
    state = ["--state", str(tmp_path / "state")]
    save_adapter(adapters / "later" / "one", 71, 2)
    save_adapter(adapters / "later" / "two", 72, 4)
    ask = json.dumps({"model": "extra", "prompt": "what is left", "max_tokens": 20, "temperature": 0})
    with running(words(place, *state), place / "cache") as first:
        assert first.change("load", lora_name="extra", lora_path="later/one").status_code == 200
        old = alone(first.http, ask)
        replaced = first.change("load", lora_name="extra", lora_path="later/two", load_inplace=True)
        assert replaced.status_code == 200
        assert first.change("unload", lora_name="a4").status_code == 200
        before, text = first.adapters(), alone(first.http, ask)
        assert old != text
        first.kill()
    with running(words(place, *state), place / "cache") as second:
        assert second.adapters() == before
        assert "a4" not in before
        assert alone(second.http, ask) == text
        # An orderly end: what runs is finished first.
        out = {}
        long = json.loads(ask) | {"max_tokens": 50, "ignore_eos": True}
        asking = threading.Thread(target=lambda: out.update(text=alone(second.http, json.dumps(long))))
        whole = alone(second.http, json.dumps(long))
        asking.start()
        until(lambda: second.metrics()["lorax_running_requests"] or out)
        assert second.stop() == 0
        asking.join(20)
        assert out["text"] == whole
        events = [line["event"] for line in second.log]
        assert events.index("ready") < events.index("stopping") < events.index("stopped")


def test_one_adapter_merged_into_the_base_is_one_model(place, server, tmp_path):
    ask = {"prompt": "just one", "max_tokens": 15, "temperature": 0}
    only = ["--base", str(place / "base"), "--only", str(place / "adapters" / "a3"), *SMALL]
    with running(only, place / "cache") as merged:
        assert [row["id"] for row in merged.http.get("/v1/models").json()["data"]] == ["a3"]
        text = alone(merged.http, json.dumps(ask | {"model": "a3"}))
        assert text == alone(server.http, json.dumps(ask | {"model": "a3"}))
        assert text != alone(server.http, json.dumps(ask | {"model": "tiny"}))
        refused = merged.change("load", lora_name="a1", lora_path="a1")
        assert refused.status_code == 403
        assert merged.stop() == 0


def test_mistakes_at_the_start_are_one_line(place, tmp_path, capsys, monkeypatch):
    from lorax import cli

    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    (tmp_path / "keys.json").write_text("{")
    for more, part in (
        (["--adapters", "nowhere"], "nowhere"),
        (["--port", "70000"], "70000"),
        (["--host", "0.0.0.0"], "--keys"),
        (["--keys", str(tmp_path / "keys.json")], "is no keys file"),
        (["--only", "a", "--adapters", str(tmp_path)], "--only"),
        (["--only", "nowhere"], "nowhere"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--port", "1", "--host", "203.0.113.7", "--keys", str(tmp_path / "none.json")], "none.json"),
    ):
        assert cli.main(["serve", "--base", str(place / "base"), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lorax: ")
        assert part in line


def test_keys_from_the_command_line(tmp_path, capsys, monkeypatch):
    from lorax import cli
    from lorax.serve.http.keys import Keys

    file = str(tmp_path / "keys.json")
    assert cli.main(["keys", "add", "alice", "--keys", file, "--adapters", "legal", "medical"]) == 0
    key = capsys.readouterr().out.strip()
    found = Keys(file).find(key)
    assert found is not None
    assert (found.name, found.adapters, found.admin) == ("alice", ("legal", "medical"), False)
    assert cli.main(["keys", "add", "root", "--keys", file, "--admin", "--json"]) == 0
    assert Keys(file).find(json.loads(capsys.readouterr().out)["key"]).admin
    assert cli.main(["keys", "list", "--keys", file]) == 0
    assert "legal, medical" in capsys.readouterr().out
    assert cli.main(["keys", "remove", "alice", "--keys", file]) == 0
    assert Keys(file).find(key) is None
    assert cli.main(["keys", "remove", "alice", "--keys", file]) == 2
    assert "root" in capsys.readouterr().err
    assert cli.main(["keys", "add", "--keys", file]) == 2


def test_the_time_that_it_took_is_in_the_log(server):
    alone(server.http, json.dumps({"model": "a1", "prompt": "q", "max_tokens": 3}))
    time.sleep(0.1)
    line = [line for line in server.log if line["event"] == "request"][-1]
    assert line["model"] == "a1"
    assert line["completion_tokens"] == 3
    assert 0 < line["ttft_ms"] <= line["ms"]
