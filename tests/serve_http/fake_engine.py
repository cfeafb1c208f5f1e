"""A small engine with the published interface: what it writes is a function of the prompt, the adapter and the seed.

Its `steps` can be held back (`pause`, `step`), so that a test decides what runs while something else happens.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from lorax import serve

VOCAB = 97


class Characters:
    """A tokenizer of printable characters, one token each, with a chat template."""

    bos_id, eos_id, chat_template = None, None, "yes"

    def encode(self, text):
        return [(ord(c) - 32) % VOCAB for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(32 + i) for i in ids)

    def encode_chat(self, messages, add_generation_prompt=True):
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages) + "assistant:")


def next_token(ids, adapter, seed):
    text = f"{list(ids)}|{adapter}|{seed}"
    return hashlib.sha256(text.encode()).digest()[0] % (VOCAB - 2)


def written(prompt, adapter, count, seed=0, tokens=None):
    """What the engine writes: the oracle of the tests."""
    ids = list((tokens or Characters()).encode(prompt)) if isinstance(prompt, str) else list(prompt)
    out = []
    for _ in range(count):
        out.append(next_token(ids + out, adapter, seed))
    return Characters().decode(out)


class Handle:
    def __init__(self, engine, request, number):
        self.engine, self.request, self.id = engine, request, number
        self.seed = request.sampling.seed or 0
        self.begin, self.first = time.monotonic(), None
        self.out, self.sent, self.ended, self.cancelled = [], 0, False, False
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()

    def cancel(self):
        self.cancelled = True
        self.engine.cancelled.append(self.id)
        self.engine.wake.set()

    async def __aiter__(self):
        while True:
            event = await self.events.get()
            yield event
            if event.finish:
                return

    def emit(self, event):
        self.ended = event.finish is not None
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def usage(self):
        now = time.monotonic() - self.begin
        first = None if self.first is None else self.first - self.begin
        return serve.Usage(len(self.request.prompt), len(self.out), 0, 0.0, first, now, 0, 0.0)

    def end(self, finish, error=None, text="", tokens=(), logprobs=()):
        self.engine.finished[finish] = self.engine.finished.get(finish, 0) + 1
        self.emit(serve.Event(tokens, text, logprobs, finish, error, self.usage()))


class FakeEngine:
    max_length = 200

    def __init__(self, delay=0.0, max_queue=64):
        self.tokenizer, self.delay, self.max_queue = Characters(), delay, max_queue
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
        self.running, self.finished, self.cancelled = [], {}, []
        self.ready, self.failure, self.started = False, None, 0
        self.known, self.generated, self.number = {}, 0, 0
        self.by_adapter = {}
        self.broken = set()  # adapters whose files have gone
        self.wake, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.closing = False

    def start(self, progress=None):
        for done in range(3):
            if progress:
                progress(done + 1, 3, "decode")
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()
        self.ready = True

    def loop(self):
        while not self.closing:
            self.go.wait()
            for handle in list(self.running):
                self.step(handle)
            if self.running:
                time.sleep(self.delay)
            else:
                self.wake.wait(0.05)
                self.wake.clear()

    def step(self, handle):
        request = handle.request
        if handle.cancelled:
            handle.end("cancelled")
        elif request.adapter in self.broken:
            handle.end("error", error=f"{request.adapter}: cannot be read (Input/output error)")
        elif request.deadline and time.monotonic() - handle.begin > request.deadline:
            handle.end("deadline")
        else:
            token = next_token([*request.prompt, *handle.out], request.adapter, handle.seed)
            handle.out.append(token)
            handle.first = handle.first or time.monotonic()
            self.generated += 1
            row = self.by_adapter.setdefault(request.adapter or "", [0, 0])
            row[1] += 1
            text = self.tokenizer.decode([token])
            logprobs = ()
            if request.sampling.logprobs is not None:
                top = tuple(((token + i) % VOCAB, -0.5 - i) for i in range(request.sampling.logprobs))
                logprobs = (serve.TokenLogprob(token, -0.5, top),)
            if any(s == text for s in request.stop):
                handle.end("stop")
            elif len(handle.out) >= request.max_new_tokens:
                handle.end("length", text=text, tokens=(token,), logprobs=logprobs)
            else:
                handle.emit(serve.Event((token,), text, logprobs))
        if handle.ended:
            self.running.remove(handle)

    def submit(self, request):
        if request.adapter is not None and request.adapter not in self.known:
            raise serve.UnknownAdapter(request.adapter, list(self.known))
        if len(self.running) >= self.max_queue:
            raise serve.Busy(len(self.running), 2.5)
        self.number += 1
        handle = Handle(self, request, self.number)
        self.by_adapter.setdefault(request.adapter or "", [0, 0])[0] += 1
        self.running.append(handle)
        self.wake.set()
        return handle

    def load(self, name, path, replace=False):
        if name in self.known and not replace:
            raise serve.AdapterError(f"{name}: is loaded already", "exists")
        weights = (Path(path) / "adapter_model.safetensors").read_bytes()
        if weights == b"corrupt":
            raise serve.AdapterError(f"{path}: the file is damaged", "corrupt")
        digest = hashlib.sha256(weights).hexdigest()
        self.known[name] = serve.AdapterInfo(name, str(path), digest, 4, 10, 100, "host", 0, time.time())
        return self.known[name]

    def unload(self, name):
        self.adapter(name)
        del self.known[name]

    def adapters(self):
        return list(self.known.values())

    def adapter(self, name):
        if name not in self.known:
            raise serve.UnknownAdapter(name, list(self.known))
        return self.known[name]

    def stats(self):
        rows = {n: serve.AdapterStats(r, 0, g, 0) for n, (r, g) in self.by_adapter.items()}
        return statistics(
            running=len(self.running), generated_tokens=self.generated, adapters=rows, finished=self.finished
        )

    def close(self):
        self.closing = True
        self.go.set()
        self.thread.join()


def statistics(**given):
    """Statistics that are 0 but for what is given."""
    kinds = {"finished": dict, "adapters": dict, "tenants": dict}
    import dataclasses

    values = {f.name: kinds.get(f.name, int)() for f in dataclasses.fields(serve.Stats)}
    return serve.Stats(**(values | given))
