"""OpenAI's endpoints over a real socket, against what the small engine is known to write."""

from __future__ import annotations

import doctest
import importlib
import json

import openai
import pytest
from fake_engine import Characters, FakeEngine, written
from http_site import put_adapter, served, until


@pytest.mark.parametrize("name", ["errors", "keys", "folders", "fields", "gate"])
def test_examples_in_docstrings_run(name):
    found = doctest.testmod(importlib.import_module(f"lorax.serve.http.{name}"))
    assert found.attempted
    assert not found.failed


def client(site, key="none"):
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0, timeout=20)


def chat_prompt(text):
    return f"user:{text};assistant:"


def test_the_official_client_completes_and_chats(server):
    api = client(server)
    done = api.completions.create(model="legal", prompt="Whereas", max_tokens=7, seed=3, temperature=0)
    assert done.choices[0].text == written("Whereas", "legal", 7, seed=3)
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (7, 7, 14)
    assert done.model == "legal"
    assert done.object == "text_completion"
    talk = [{"role": "user", "content": "hi"}]
    said = api.chat.completions.create(model="medical", messages=talk, max_completion_tokens=5)
    assert said.choices[0].message.content == written(chat_prompt("hi"), "medical", 5)
    assert said.choices[0].message.role == "assistant"
    assert said.object == "chat.completion"
    # The base alone, and the same prompt as tokens and as one of several.
    ids = Characters().encode("abc")
    many = api.completions.create(model="tiny", prompt=["abc", "de"], max_tokens=4)
    assert [c.text for c in many.choices] == [written("abc", None, 4), written("de", None, 4)]
    assert [c.index for c in many.choices] == [0, 1]
    assert many.usage.prompt_tokens == 5
    assert api.completions.create(model="tiny", prompt=ids, max_tokens=4).choices[0].text == written("abc", None, 4)


def test_the_official_client_streams(server):
    api = client(server)
    chunks = list(
        api.completions.create(
            model="legal", prompt="Whereas", max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == written("Whereas", "legal", 6)
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 5 + ["length"]
    assert chunks[-1].usage.completion_tokens == 6
    assert all(c.usage is None for c in chunks[:-1])
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    parts = list(api.chat.completions.create(model="legal", messages=talk, max_tokens=5, stream=True, n=2, seed=4))
    for choice in (0, 1):
        mine = [c.choices[0] for c in parts if c.choices[0].index == choice]
        text = "".join(c.delta.content or "" for c in mine)
        assert text == written("system:s;user:hi;assistant:", "legal", 5, seed=4 + choice)
        assert mine[0].delta.role == "assistant"
        assert mine[-1].finish_reason == "length"


def test_the_official_async_client(server):
    import asyncio

    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as api:
            ask = [api.completions.create(model=m, prompt="p", max_tokens=9) for m in ("legal", "medical", "tiny") * 5]
            return await asyncio.gather(*ask)

    texts = [done.choices[0].text for done in asyncio.run(both())]
    assert texts == [written("p", m, 9) for m in ("legal", "medical", None)] * 5


def test_log_probabilities_in_both_forms(server):
    api = client(server)
    flat = api.completions.create(model="legal", prompt="xy", max_tokens=3, logprobs=2).choices[0]
    assert "".join(flat.logprobs.tokens) == flat.text
    assert flat.logprobs.token_logprobs == [-0.5] * 3
    assert [len(top) for top in flat.logprobs.top_logprobs] == [2, 2, 2]
    assert flat.logprobs.text_offset == [0, 1, 2]
    talk = [{"role": "user", "content": "hi"}]
    said = api.chat.completions.create(model="legal", messages=talk, max_tokens=3, logprobs=True, top_logprobs=3)
    content = said.choices[0].logprobs.content
    assert "".join(row.token for row in content) == said.choices[0].message.content
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [len(row.top_logprobs) for row in content] == [3, 3, 3]
    streamed = api.completions.create(model="legal", prompt="xy", max_tokens=3, logprobs=0, stream=True)
    rows = [chunk.choices[0].logprobs for chunk in streamed]
    assert [row.text_offset for row in rows] == [[0], [1], [2]]


def test_stop_echo_and_the_shape_of_a_stream(server):
    whole = written("abc", None, 8)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "stop": [whole[3]], "echo": True}
    answer = server.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "abc" + whole[: whole.index(whole[3])]
    assert answer["choices"][0]["finish_reason"] == "stop"
    reply = server.http.post("/v1/completions", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-request-id"].startswith("req-")
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == answer["choices"][0]["text"]


def test_models_are_listed(server):
    api = client(server)
    assert [m.id for m in api.models.list()] == ["tiny", "legal", "medical"]
    assert api.models.retrieve("legal").parent == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("nobody")


def test_an_answer_as_long_as_there_is_room(server):
    talk = [{"role": "user", "content": "hi"}]
    said = client(server).chat.completions.create(model="tiny", messages=talk)
    assert said.usage.total_tokens == FakeEngine.max_length
    assert len(client(server).completions.create(model="tiny", prompt="p").choices[0].text) == 16


def test_loading_replacing_and_unloading_as_vllm_has_it(server, root):
    put_adapter(root / "new", b"one")
    send = {"lora_name": "new", "lora_path": "new"}

    def post(what, body):
        return server.http.post(f"/v1/{what}_lora_adapter", json=body, headers=server.admin)

    assert post("load", send).text == "Success: LoRA adapter 'new' added successfully."
    ask = {"model": "new", "prompt": "p", "max_tokens": 3}
    assert server.http.post("/v1/completions", json=ask).json()["choices"][0]["text"] == written("p", "new", 3)
    again = post("load", send)
    assert again.status_code == 409
    assert "already" in again.json()["error"]["message"]
    before = server.engine.adapter("new").digest
    put_adapter(root / "new", b"two")
    assert post("load", {**send, "lora_path": str(root / "new"), "load_inplace": True}).status_code == 200
    assert server.engine.adapter("new").digest != before
    assert post("unload", {"lora_name": "new"}).status_code == 200
    assert server.http.post("/v1/completions", json=ask).status_code == 404
    assert post("unload", {"lora_name": "new"}).status_code == 404


def test_what_was_unloaded_is_not_found_again_by_a_restart(root):
    with served(root) as site:
        body = {"lora_name": "legal"}
        assert site.http.post("/v1/unload_lora_adapter", json=body, headers=site.admin).status_code == 200
    with served(root) as site:
        assert [a.name for a in site.engine.adapters()] == ["medical"]
        body |= {"lora_path": "legal"}
        assert site.http.post("/v1/load_lora_adapter", json=body, headers=site.admin).status_code == 200
    with served(root) as site:
        assert sorted(a.name for a in site.engine.adapters()) == ["legal", "medical"]


def test_metrics_count_what_happened(server):
    ask = {"model": "legal", "prompt": "abc", "max_tokens": 5}
    for _ in range(3):
        server.http.post("/v1/completions", json=ask)
    server.http.post("/v1/completions", json={**ask, "model": "nobody"})
    server.http.get("/made/up/path")

    def rows():
        text = server.http.get("/metrics").text
        return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    until(lambda: rows()["lorax_time_to_first_token_seconds_count"] == "3.0")
    found = rows()
    assert found['lorax_adapter_generated_tokens_total{adapter="legal"}'] == "15.0"
    assert found['lorax_adapter_requests_total{adapter="legal"}'] == "3.0"
    assert found['lorax_http_requests_total{path="/v1/completions",status="200"}'] == "3.0"
    assert found['lorax_http_requests_total{path="/v1/completions",status="404"}'] == "1.0"
    assert found['lorax_http_requests_total{path="other",status="404"}'] == "1.0"
    assert found["lorax_time_per_token_seconds_count"] == "3.0"
    assert found['lorax_pages{holds="free"}'] == "0.0"
    assert float(found["lorax_tokens_per_second"]) >= 0


def test_a_server_that_is_starting_says_so(root):
    engine = FakeEngine()
    began, go = [], __import__("threading").Event()
    start = engine.start

    def slow(progress):
        began.append(1)
        go.wait(20)
        start(progress)

    engine.start = slow
    import threading

    import httpx2

    found = {}

    def look():
        until(lambda: began)
        # The address is known once the server listens.
        with httpx2.Client(base_url=found["url"], timeout=10) as http:
            found["health"] = http.get("/health").status_code
            found["ready"] = http.get("/ready")
            found["ask"] = http.post("/v1/completions", json={"model": "tiny", "prompt": "p"})
        go.set()

    from lorax.serve.http import Folders, Keys, Server, Settings, Site, listen
    from lorax.serve.http.server import url

    site = Site(engine, Settings("tiny"), Keys(), Folders([root]))
    listener = listen("127.0.0.1", 0)
    found["url"] = url(listener)
    server = Server(site)
    thread = threading.Thread(target=look)
    thread.start()
    runner = threading.Thread(target=server.serve_until_told, args=(listener,))
    runner.start()
    thread.join(20)
    until(lambda: site.ready)
    server.should_exit = True
    runner.join(20)
    assert found["health"] == 200
    assert found["ready"].status_code == found["ask"].status_code == 503
    assert "starting" in found["ready"].json()["reason"]
    assert "retry-after" in found["ask"].headers
