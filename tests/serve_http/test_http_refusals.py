"""What a server must refuse, with the right status and a message that helps; and that others are unharmed by it."""

from __future__ import annotations

import json
import os
import socket
import time

import httpx2
import openai
import pytest
from fake_engine import FakeEngine, written
from http_site import put_adapter, served, until

from lorax.errors import LoraxError
from lorax.serve.http import Folders, keys

ASK = {"model": "legal", "prompt": "abc", "max_tokens": 4}


def error(reply, status, *parts):
    """The message of a refusal, which must have this status and name these things."""
    assert reply.status_code == status, reply.text
    found = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    for part in parts:
        assert part in found["message"]
    return found


@pytest.mark.parametrize(
    ("change", "status", "parts"),
    [
        ({"model": "nobody"}, 404, ["nobody", "/v1/models"]),
        ({"model": None}, 400, ["model"]),
        ({"model": "../../etc/passwd"}, 404, ["etc"]),
        ({"prompt": None}, 400, ["prompt"]),
        ({"prompt": ""}, 400, ["prompt", "empty"]),
        ({"prompt": [[]]}, 400, ["prompt", "empty"]),
        ({"prompt": [1, 97]}, 400, ["prompt", "0..96"]),
        ({"prompt": [-1]}, 400, ["prompt"]),
        ({"prompt": ["a"] * 17}, 400, ["prompt", "17"]),
        ({"prompt": "x" * 300}, 400, ["300 tokens", "199"]),
        ({"prompt": "x" * 190, "max_tokens": 50}, 400, ["max_tokens", "190"]),
        ({"temprature": 1}, 400, ["temprature"]),
        ({"temperature": 3}, 400, ["temperature", "0 to 2"]),
        ({"temperature": "hot"}, 400, ["temperature"]),
        ({"temperature": True}, 400, ["temperature"]),
        ({"top_p": 0}, 400, ["top_p", "above 0"]),
        ({"min_p": 1}, 400, ["min_p"]),
        ({"n": 0}, 400, ["n:"]),
        ({"n": 1000}, 400, ["n:"]),
        ({"n": 2, "best_of": 3}, 400, ["best_of"]),
        ({"max_tokens": 0}, 400, ["max_tokens"]),
        ({"max_tokens": 10**9}, 400, ["max_tokens"]),
        ({"logprobs": 21}, 400, ["logprobs"]),
        ({"echo": True, "logprobs": 1}, 400, ["echo"]),
        ({"stop": ["a"] * 9}, 400, ["stop"]),
        ({"stop": [""]}, 400, ["stop"]),
        ({"stop": 5}, 400, ["stop"]),
        ({"seed": "x"}, 400, ["seed"]),
        ({"stream": "yes"}, 400, ["stream"]),
        ({"stream_options": {"usage": True}}, 400, ["usage"]),
        ({"logit_bias": {"5": 1}}, 400, ["logit_bias", "not supported"]),
        ({"tools": [{"type": "function"}]}, 400, ["tools"]),
        ({"priority": 2001}, 400, ["priority"]),
        ({"deadline": -1}, 400, ["deadline"]),
    ],
)
def test_fields_that_are_wrong_are_named(refusing, change, status, parts):
    error(refusing.http.post("/v1/completions", json=ASK | change), status, *parts)


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        (None, ["messages"]),
        ([], ["messages"]),
        (["hi"], ["messages[0]", "role"]),
        ([{"role": "tool", "content": "x"}], ["messages[0]", "role"]),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], ["messages[1].content"]),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ["messages[0].content", "text"]),
        ([{"role": "user", "content": "x" * 300}], ["messages", "tokens"]),
    ],
)
def test_conversations_that_are_wrong_are_named(refusing, messages, parts):
    body = {"model": "legal", "messages": messages}
    error(refusing.http.post("/v1/chat/completions", json=body), 400, *parts)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """One server for all that changes nothing."""
    folder = tmp_path_factory.mktemp("adapters")
    put_adapter(folder / "legal", b"legal weights")
    with served(folder, max_body=1 << 16) as found:
        yield found
        # After all that it answers as it did.
        assert found.http.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == written("abc", "legal", 4)


@pytest.mark.parametrize("raw", [b"{", b"", b"[1]", b'"x"', b"{'a': 1}", b'{"a": NaN}', b"\xff\xfe", b"[" * 60000])
def test_what_is_no_json_object(refusing, raw):
    head = {"Content-Type": "application/json"}
    error(refusing.http.post("/v1/completions", content=raw, headers=head), 400, "JSON")


def test_other_types_paths_methods_and_names(refusing):
    http = refusing.http
    error(http.post("/v1/completions", content=json.dumps(ASK)), 415, "application/json")
    error(http.post("/v1/completions", data=ASK), 415)
    error(http.get("/v1/completions"), 405)
    error(http.get("/v1/nothing"), 404, "/v1/nothing")
    error(http.post("/v1/completions", json=ASK, headers={"Host": "evil.example:80"}), 421, "evil.example")
    assert http.get("/health", headers={"Host": "localhost:1"}).status_code == 200


def test_ten_megabytes_are_refused_with_and_without_their_length(refusing):
    body = json.dumps(ASK | {"prompt": "x" * 10_000_000}).encode()
    head = {"Content-Type": "application/json"}
    found = error(refusing.http.post("/v1/completions", content=body, headers=head), 413, "65,536 bytes")
    assert found["code"] == "request_too_large"

    def pieces():
        for at in range(0, len(body), 65536):
            yield body[at : at + 65536]

    try:
        reply = httpx2.post(f"{refusing.url}/v1/completions", content=pieces(), headers=head, timeout=20)
    except httpx2.WriteError:
        # The server had answered and stopped listening before the client was done sending.
        return
    error(reply, 413)


def test_keys_and_what_each_may_use(tenants):
    http, keys_of = tenants.http, tenants.keys

    def ask(who, model):
        return http.post(
            "/v1/completions", json=ASK | {"model": model}, headers=keys_of[who] if isinstance(who, str) else who
        )

    error(ask({}, "legal"), 401, "Authorization")
    error(ask({"Authorization": "Bearer lorax-wrong"}, "legal"), 401, "not known")
    error(ask({"Authorization": f"Basic {tenants.secrets['ann']}"}, "legal"), 401)
    assert ask("alice", "legal").json()["choices"][0]["text"] == written("abc", "legal", 4)
    assert ask("alice", "tiny").status_code == 200
    # Another's adapter and one that is nowhere: the same answer.
    other, nowhere = error(ask("alice", "medical"), 403, "may not use"), error(ask("alice", "nowhere"), 403)
    assert other["message"].replace("medical", "") == nowhere["message"].replace("nowhere", "")
    error(ask("alice", "not-there"), 404)
    assert ask("bob", "medical").status_code == 200
    assert {ask("ann", m).status_code for m in ("legal", "medical", "tiny")} == {200}
    listed = http.get("/v1/models", headers=keys_of["alice"]).json()["data"]
    assert [row["id"] for row in listed] == ["tiny", "legal"]
    assert str(tenants.site.folders.roots[0]) not in str(listed)
    assert str(tenants.site.folders.roots[0]) in http.get("/v1/models", headers=keys_of["root"]).text
    assert http.get("/v1/models/medical", headers=keys_of["alice"]).status_code == 403
    with pytest.raises(openai.AuthenticationError, match="not known"):
        openai.OpenAI(base_url=f"{tenants.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_administration_needs_an_admin_key(tenants, server):
    body = {"lora_name": "legal"}
    for who, status in ((None, 401), ("ann", 403), ("alice", 403)):
        head = {} if who is None else tenants.keys[who]
        error(tenants.http.post("/v1/unload_lora_adapter", json=body, headers=head), status)
        error(tenants.http.post("/v1/load_lora_adapter", json=body, headers=head), status)
    high = ASK | {"priority": 5}
    error(tenants.http.post("/v1/completions", json=high, headers=tenants.keys["ann"]), 403, "priority")
    assert tenants.http.post("/v1/completions", json=high, headers=tenants.keys["root"]).status_code == 200
    # Without a keys file everybody may ask, and still nobody may administrate without a key.
    error(server.http.post("/v1/unload_lora_adapter", json=body), 403, "admin key")
    assert server.http.post("/v1/unload_lora_adapter", json=body, headers=server.admin).status_code == 200


def test_metrics_show_a_key_its_own_adapters(tenants):
    for who, model in (("alice", "legal"), ("bob", "medical")):
        tenants.http.post("/v1/completions", json=ASK | {"model": model}, headers=tenants.keys[who])
    assert tenants.http.get("/metrics").status_code == 401
    seen = tenants.http.get("/metrics", headers=tenants.keys["alice"]).text
    assert 'adapter="legal"' in seen
    assert "medical" not in seen
    assert 'adapter="medical"' in tenants.http.get("/metrics", headers=tenants.keys["root"]).text


def test_keys_are_digests_on_the_disk_and_changes_are_seen(tenants):
    text = tenants.file.read_text()
    assert not any(secret in text for secret in tenants.secrets.values())
    assert os.stat(tenants.file).st_mode & 0o077 == 0
    asked = [tenants.http.get("/v1/models", headers=tenants.keys["bob"]).status_code]
    keys.remove(tenants.file, "bob")
    until(lambda: tenants.http.get("/v1/models", headers=tenants.keys["bob"]).status_code == 401)
    assert asked == [200]
    # Damaged in somebody's editor: those who could ask still can.
    tenants.file.write_text("{")
    time.sleep(1.1)
    assert tenants.http.get("/v1/models", headers=tenants.keys["ann"]).status_code == 200


def test_every_key_is_compared_in_constant_time(tmp_path, monkeypatch):
    """Each look-up compares with every entry, found or not, by the comparison that takes the same time for any two."""
    file = tmp_path / "keys.json"
    secrets = [keys.add(file, f"k{i}") for i in range(4)]
    known, seen = keys.Keys(file), []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or real(a, b))
    found = [known.find(key) for key in (secrets[0], secrets[3], "wrong")]
    assert [key and key.name for key in found] == ["k0", "k3", None]
    assert len(seen) == 12


def test_a_keys_file_that_is_none(tmp_path):
    for text in ("", "{}", '{"keys": [{}]}', '{"keys": 5}', "[]"):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(LoraxError, match="is no keys file"):
            keys.Keys(tmp_path / "keys.json")
    with pytest.raises(LoraxError, match="cannot be read"):
        keys.Keys(tmp_path / "nothing.json")
    keys.add(tmp_path / "new.json", "ann")
    with pytest.raises(LoraxError, match="already"):
        keys.add(tmp_path / "new.json", "ann")


def test_adapters_come_from_allowed_folders_alone(server, root, tmp_path):
    outside = put_adapter(tmp_path / "outside" / "secret")
    inside = put_adapter(root / "good", b"good")
    (root / "link").symlink_to(outside)
    put_adapter(root / "sly", b"x")
    (root / "sly" / "adapter_model.safetensors").unlink()
    (root / "sly" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "loop").symlink_to(root / "loop")
    pickled = put_adapter(root / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (root / "empty").mkdir()
    put_adapter(root / "corrupt", b"corrupt")

    def load(path, name="new"):
        body = {"lora_name": name, "lora_path": path}
        return server.http.post("/v1/load_lora_adapter", json=body, headers=server.admin)

    away = (str(outside), "../outside/secret", "link", "sly", f"{root}/../outside/secret", "/etc", "/", "..")
    for path in away:
        assert error(load(path), 403)["code"] == "path_not_allowed", path
    error(load("pickled"), 400, "pickle", "adapter_model.safetensors")
    error(load("empty"), 404, "no adapter")
    error(load("nowhere"), 404)
    error(load("loop/x"), 404)
    error(load("\0"), 400)
    error(load("corrupt"), 400, "damaged")
    for name in ("tiny", "", "a b", "x" * 200, "../up", "ä"):
        error(load("good", name), 400, "lora_name")
    assert load("good").status_code == load(str(inside), "twice").status_code == 200
    # Nor does a start follow them, or open a pickle.
    assert "link" not in Folders([root]).scan()
    with served(root) as again:
        assert sorted(a.name for a in again.engine.adapters()) == ["good", "legal", "medical"]


def test_too_many_at_once_are_told_when_to_come_back(root, tmp_path):
    engine = FakeEngine(max_queue=3)
    file = tmp_path / "keys.json"
    head = {name: {"Authorization": f"Bearer {keys.add(file, name)}"} for name in ("a", "b")}
    with served(root, engine, file, max_requests=5, max_requests_per_key=4) as site:
        engine.go.clear()

        def ask(who, n):
            return site.http.post("/v1/completions", json=ASK | {"n": n, "model": "tiny"}, headers=head[who])

        found = error(ask("a", 5), 429, "this key")
        assert found["type"] == "rate_limit_error"
        error(ask("a", 6), 429, "5 requests at once")
        full = ask("a", 4)
        error(full, 429, "waiting")
        assert full.headers["retry-after"] == "3"
        engine.go.set()
        # All or none: the three that were taken before the fourth was refused were given up.
        until(lambda: not engine.running)
        assert len(engine.cancelled) == 3
        assert site.site.gate.inside == 0
        assert ask("b", 2).status_code == 200


def test_an_adapter_whose_disk_went_away_is_503_and_others_go_on(server):
    server.engine.broken.add("legal")
    for stream in (False, True):
        error(server.http.post("/v1/completions", json=ASK | {"stream": stream}), 503, "legal", "cannot be read")
    reply = server.http.post("/v1/completions", json=ASK | {"model": "medical"})
    assert reply.json()["choices"][0]["text"] == written("abc", "medical", 4)


def test_a_deadline(root):
    with served(root, FakeEngine(delay=0.02)) as site:
        reply = site.http.post("/v1/completions", json=ASK | {"max_tokens": 190, "deadline": 0.2})
        error(reply, 504, "deadline")
        late = site.http.post("/v1/completions", json=ASK | {"max_tokens": 190, "deadline": 0.2, "stream": True})
        assert late.status_code == 200
        assert "deadline" in late.text.splitlines()[-2]
        assert "[DONE]" not in late.text


def test_a_client_that_goes_away_is_cancelled(root):
    engine = FakeEngine(delay=0.01)
    with served(root, engine) as site:
        for stream in (False, True):
            before = len(engine.cancelled)
            with pytest.raises(httpx2.ReadTimeout):
                # A stream's first bytes come at once; what is read afterwards stops early.
                httpx2.post(
                    f"{site.url}/v1/completions",
                    json=ASK | {"max_tokens": 190, "stream": stream, "n": 2},
                    timeout=httpx2.Timeout(5, read=0.005 if stream else 0.3),
                )
            until(lambda: not engine.running, 1.5)
            until(lambda: len(engine.cancelled) >= before + 2)  # noqa: B023
            assert site.site.gate.inside == 0
        with httpx2.stream(
            "POST", f"{site.url}/v1/completions", json=ASK | {"max_tokens": 190, "stream": True}
        ) as reply:
            next(reply.iter_lines())
        until(lambda: not engine.running, 1.0)
        assert engine.finished["cancelled"] >= 5


def test_slow_clients_lose_their_own_connection_alone(root):
    limits = {"header_timeout": 0.5, "body_timeout": 0.5}
    with served(root, **limits) as site:
        host, port = site.url.removeprefix("http://").split(":")

        def slowly(first, drip, seconds):
            """Send a request a byte at a time; what came back, and after how long the server ended it."""
            begin, came = time.monotonic(), b""
            with socket.create_connection((host, int(port)), timeout=5) as s:
                s.sendall(first)
                s.settimeout(0.05)
                while time.monotonic() - begin < seconds:
                    try:
                        s.sendall(drip)
                        piece = s.recv(65536)
                        came += piece
                        if not piece:
                            break
                    except TimeoutError:
                        continue
                    except OSError:
                        break
            return came, time.monotonic() - begin

        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        came, seconds = slowly(head, b"X-a: b\r\n", 5)
        assert b" 408 " in came
        assert seconds < 2
        came, seconds = slowly(b"", b"G", 5)
        assert seconds < 2
        body = head + b"Content-Type: application/json\r\nContent-Length: 60000\r\n\r\n{"
        came, seconds = slowly(body, b" ", 5)
        assert b" 408 " in came
        assert seconds < 3
        assert site.http.post("/v1/completions", json=ASK).status_code == 200


def test_too_many_connections_are_turned_away(root):
    with served(root, max_connections=3, header_timeout=1.0) as site:
        host, port = site.url.removeprefix("http://").split(":")
        open_ones = [socket.create_connection((host, int(port))) for _ in range(3)]
        with socket.create_connection((host, int(port)), timeout=5) as one_more:
            assert b" 503 " in one_more.recv(4096)
        for s in open_ones:
            s.close()
        until(lambda: site.http.get("/health").status_code == 200)


def test_a_client_that_does_not_read_is_cut_off(root):
    engine = FakeEngine(delay=0.002)
    engine.max_length = 40_000
    engine.tokenizer.decode = lambda ids, skip_special=True: "x" * 50_000
    with served(root, engine, send_timeout=0.5, max_tokens=1_000_000) as site:
        host, port = site.url.removeprefix("http://").split(":")
        body = json.dumps(ASK | {"max_tokens": 1_000, "stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=5) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + kind + body)
            until(lambda: engine.cancelled, 15)
        until(lambda: not engine.running)
        assert site.site.gate.inside == 0


def test_draining_ends_what_runs_and_takes_nothing_new(root):
    import signal
    import threading

    engine = FakeEngine(delay=0.02)
    with served(root, engine) as site:
        out = {}

        def ask():
            out["reply"] = httpx2.post(f"{site.url}/v1/completions", json=ASK | {"max_tokens": 40}, timeout=20)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: engine.running)
        site.server.handle_exit(signal.SIGTERM, None)
        until(lambda: site.site.gate.closed)
        with httpx2.Client(base_url=site.url) as http:
            refused = http.post("/v1/completions", json=ASK)
            ready = http.get("/ready")
        error(refused, 503, "stopping")
        assert "retry-after" in refused.headers
        assert ready.status_code == 503
        asking.join(20)
        assert out["reply"].json()["choices"][0]["text"] == written("abc", "legal", 40)
        site.thread.join(10)
        assert not site.thread.is_alive()


def test_a_fault_of_the_server_is_500_with_a_number_for_the_log(server, caplog):
    def broken(request):
        raise RuntimeError("secret detail")

    whole, server.engine.submit = server.engine.submit, broken
    found = error(server.http.post("/v1/completions", json=ASK), 500, "req-")
    assert "secret" not in found["message"]
    number = found["message"].split()[-1]
    until(lambda: any(getattr(r, "fields", {}).get("id") == number for r in caplog.records if r.exc_info))
    server.engine.submit = whole
    assert server.http.post("/v1/completions", json=ASK).status_code == 200
    assert server.site.gate.inside == 0


def test_logs_are_json_without_prompts_or_keys(tenants, capsys):
    import io
    import logging

    from lorax.serve.http import logs

    stream, before = io.StringIO(), logging.getLogger("lorax.serve").handlers
    logs.set_up(stream)
    try:
        tenants.http.post("/v1/completions", json=ASK | {"prompt": "very private"}, headers=tenants.keys["alice"])
        until(lambda: '"path"' in stream.getvalue())
    finally:
        for name in ("lorax.serve", "uvicorn"):
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = before, True
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["status"] == 200
    assert (line["key"], line["model"], line["prompt_tokens"], line["completion_tokens"]) == ("alice", "legal", 12, 4)
    assert {"time", "level", "id", "ms", "ttft_ms", "finish"} <= set(line)
    assert "private" not in stream.getvalue()
    assert tenants.secrets["alice"] not in stream.getvalue()
