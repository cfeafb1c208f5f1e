"""A server over the small engine: a real socket, in a thread of this process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
from fake_engine import FakeEngine

from lorax.serve.http import Folders, Forgotten, Keys, Server, Settings, Site, listen
from lorax.serve.http.server import url


def put_adapter(folder: Path, weights: bytes = b"weights") -> Path:
    """A folder that looks like an adapter's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@contextlib.contextmanager
def served(folder: Path, engine: FakeEngine | None = None, keys_file: Path | None = None, **limits):
    """A running server over `folder`, ready, with an HTTP client and an admin key."""
    engine = engine or FakeEngine()
    settings = Settings("tiny", hosts=("127.0.0.1", "localhost"), **limits)
    site = Site(
        engine, settings, Keys(keys_file, "admin-secret"), Folders([folder]), Forgotten(folder / ".unloaded.json")
    )
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(site, on_ready=ready.set)
    thread = threading.Thread(target=server.serve_until_told, args=(listener,))
    address = url(listener)
    thread.start()
    try:
        assert ready.wait(20)
        with httpx2.Client(base_url=address, timeout=20) as client:
            admin = {"Authorization": "Bearer admin-secret"}
            yield SimpleNamespace(
                url=address, engine=engine, site=site, http=client, admin=admin, server=server, thread=thread
            )
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(true, seconds=10.0):
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
