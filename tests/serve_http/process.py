"""`lorax serve` as a process of its own, and clients that load it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

ADMIN = {"Authorization": "Bearer admin-secret"}


class Process:
    """A server; its log is read as it comes.

    Args:
        words: after `lorax serve`.
        cache: a folder for compiled programs and state, so that a restart compiles nothing.
    """

    def __init__(self, words: list[str], cache: Path):
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
        environment |= {"LORAX_ADMIN_KEY": "admin-secret", "LORAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "lorax", "serve", "--port", "0", "--json", *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # Everything up to the closing brace: what is printed once requests are answered.
        assert self.process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, f"the server ended: {self.log[-5:]}"
            said += line
        self.url = json.loads(said)["url"]
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else {"event": "text", "message": line})

    def metrics(self) -> dict[str, float]:
        """The figures by name and labels."""
        rows = [line.rsplit(" ", 1) for line in self.http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in rows}

    def adapters(self) -> dict[str, str]:
        """name -> digest of what is loaded."""
        return {row["id"]: row["digest"] for row in self.http.get("/v1/models").json()["data"] if row["parent"]}

    def change(self, what: str, **body: Any) -> httpx2.Response:
        """Load or unload an adapter."""
        return self.http.post(f"/v1/{what}_lora_adapter", json=body, headers=ADMIN)

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) << 10

    def kill(self) -> None:
        """As a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def stop(self) -> int:
        """As a supervisor would; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        code = self.process.wait(60)
        self.http.close()
        self._reader.join(10)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def running(words: list[str], cache: Path):
    """A server for the length of a block, whatever happens in it."""
    server = Process(words, cache)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@dataclass
class Load:
    """What clients did.

    answers: request (as JSON) -> the texts that came back for it.
    cancelled: requests that their client gave up.
    failed: (request, status, message) of what came back as an error.
    """

    answers: dict[str, list[str]] = field(default_factory=dict)
    cancelled: int = 0
    failed: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def completed(self) -> int:
        return sum(map(len, self.answers.values()))


def load(url: str, requests: list[dict[str, Any]], clients: int, seconds: float, cancels: float, seed: int = 0) -> Load:
    """Ask from many clients at once for some seconds, each one request after the other, drawn at random.

    Args:
        cancels: part of the requests that their client gives up somewhere in the middle.
    """
    return asyncio.run(_load(url, requests, clients, seconds, cancels, seed))


async def _load(url: str, requests: list[Any], clients: int, seconds: float, cancels: float, seed: int) -> Load:
    done = Load()
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
            while loop.time() < end:
                body = rng.choice(requests)
                if rng.random() < cancels:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(rng.uniform(0.001, 0.4)):
                            await _ask(http, body, rng.random() < 0.5)
                    done.cancelled += 1
                    continue
                status, text = await _ask(http, body, rng.random() < 0.5)
                key = json.dumps(body, sort_keys=True)
                if status == 200:
                    done.answers.setdefault(key, []).append(text)
                else:
                    done.failed.append((key, status, text))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return done


async def _ask(http: httpx2.AsyncClient, body: dict[str, Any], stream: bool) -> tuple[int, str]:
    """(status, text) of a completion, whole or streamed: the text is the same."""
    if not stream:
        reply = await http.post("/v1/completions", json=body)
        found = reply.json()
        return reply.status_code, found["choices"][0]["text"] if reply.status_code == 200 else str(found)
    text = ""
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        if reply.status_code != 200:
            return reply.status_code, (await reply.aread()).decode()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                found = json.loads(line[6:])
                if "error" in found:
                    return 500, str(found)
                text += found["choices"][0]["text"]
    assert line_ended(line)
    return 200, text


def line_ended(line: str) -> bool:
    return line in ("data: [DONE]", "")


def alone(http: httpx2.Client, request: str) -> str:
    """The answer to a request when nobody else asks."""
    return http.post("/v1/completions", json=json.loads(request)).json()["choices"][0]["text"]
