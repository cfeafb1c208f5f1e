"""`Worker`: the engine's thread, which schedules, steps the model and hands tokens over.

    inbox -> [ plan -> step prompts -> step tokens -> events ] ...

Callers' threads put into the inbox, under `turn`; all else belongs to this thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np

from lorax.serve.batch import Batches
from lorax.serve.handle import Handle, Post
from lorax.serve.programs import Programs
from lorax.serve.request import Event, TokenLogprob, Usage
from lorax.serve.sampling import Drawn
from lorax.serve.scheduler import Scheduler
from lorax.serve.sequence import Sequence
from lorax.serve.stats import Counters
from lorax.serve.store import AdapterStore


class Worker:
    """A thread over compiled programs.

    Args:
        programs, store: what it steps, and where adapters are.
        eos: tokens that end an answer.

    inbox, cancelled, live: new requests, handles to cancel, all sequences that are not over; under `turn`.
    pace: seconds between requests that end, smoothed.
    failure: why the thread ended by itself.
    """

    def __init__(self, programs: Programs, store: AdapterStore, eos: frozenset[int]):
        self.programs, self.store, self.eos = programs, store, eos
        self.scheduler: Scheduler
        self.counters = Counters()
        self.turn = threading.Condition()
        self.inbox: deque[Sequence] = deque()
        self.cancelled: deque[Handle] = deque()
        self.live: dict[int, Sequence] = {}
        self.draining = False
        self.failure: str | None = None
        self.pace = 1.0
        self._batches, self._post = Batches(programs), Post()
        self._thread: threading.Thread | None = None
        self._woken = self._closing = False
        self._last_end = 0.0

    def start(self, scheduler: Scheduler) -> None:
        """Begin to serve."""
        self.scheduler = scheduler
        self._thread = threading.Thread(target=self._run, name="lorax-engine", daemon=True)
        self._thread.start()

    @property
    def serving(self) -> bool:
        """Started, and taking requests."""
        return self._thread is not None and self._thread.is_alive() and not self.draining

    def cancel(self, handle: Handle) -> None:
        """Have a request end; from any thread."""
        with self.turn:
            self.cancelled.append(handle)
            self.turn.notify()

    def wake(self) -> None:
        """Something that a sequence waits for may be there; from any thread."""
        with self.turn:
            self._woken = True
            self.turn.notify()

    def close(self) -> None:
        """End at once."""
        with self.turn:
            self.draining = self._closing = True
            self.turn.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        error = "the engine ended"
        try:
            while self._wait():
                self._once()
        except Exception as caught:
            # Whoever waits for a token must hear of it; the thread's own report follows.
            self.failure = error = f"the engine failed: {type(caught).__name__}: {caught}"
            self._fail_all("error", error)
            raise
        finally:
            self._fail_all("cancelled", None if self._closing else error)

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self.turn:
            while not self._closing:
                waiting = bool(self.scheduler.line)
                if self.inbox or self.cancelled or self._woken or self.scheduler.running:
                    self._woken = False
                    return True
                # One that waits may have a deadline, or wait for room that time gives.
                self.turn.wait(0.01 if waiting else None)
                if waiting:
                    return not self._closing
            return False

    def _once(self) -> None:
        begin = time.monotonic()
        before = self.counters.step_seconds
        self._receive(begin)
        plan = self.scheduler.plan(begin)
        for sequence in plan.failed:
            self._end(sequence, "error", sequence.adapter.error or "the adapter could not be read")
        if plan.prefill and plan.shape is not None:
            self._compute(plan.prefill, *plan.shape)
        decode = [(s, 1) for s in plan.decode if s.finish is None]
        self.counters.batch = len(plan.prefill) + len(decode)
        if decode:
            self._compute(decode, self.programs.bucket(self.programs.rows, len(decode)), 1)
        for handle in self._post.deliver():
            self.cancel(handle)
        if plan:
            spent = time.monotonic() - begin
            self.counters.host_seconds += spent - (self.counters.step_seconds - before)

    def _receive(self, now: float) -> None:
        """New requests, cancelled ones, and those whose time is up."""
        with self.turn:
            new, self.inbox = self.inbox, deque()
            gone, self.cancelled = self.cancelled, deque()
            dead = [s for s in self.live.values() if s.expires is not None and s.expires <= now]
        for sequence in new:
            self.scheduler.submit(sequence)
        for handle in gone:
            sequence = self.live.get(handle.id)
            if sequence is not None:
                self.scheduler.finish(sequence)
                self._end(sequence, "cancelled")
        for sequence in dead:
            if sequence.finish is None:
                self.scheduler.finish(sequence)
                self._end(sequence, "deadline")

    def _compute(self, work: list[tuple[Sequence, int]], rows: int, tokens: int) -> None:
        """One program: its arrays, its logits, and a token for every sequence that has been read to its end."""
        batches = self._batches
        arrays, route = batches.rows(work, rows, tokens), batches.route(work, rows)
        settings = batches.settings(work, rows)
        begin = time.monotonic()
        logits = self.programs.step(arrays, route)
        drawn = Drawn(*map(np.asarray, self.programs.draw(logits, settings)))
        now = time.monotonic()
        self.counters.steps += 1
        self.counters.step_seconds += now - begin
        for row, (sequence, count) in enumerate(work):
            if sequence.todo == count:
                self._token(sequence, count, row, drawn, now)
            else:
                self.scheduler.advance(sequence, count, None)

    def _token(self, s: Sequence, count: int, row: int, drawn: Drawn, now: float) -> None:
        """A new token of a sequence, or its end."""
        token, r = int(drawn.token[row]), s.request
        if s.first_token is None:
            s.first_token = now
        if token in r.stop_ids or (token in self.eos and not r.ignore_eos):
            self.scheduler.advance(s, count, None)
            self._finish(s, "stop", s.text.end() if s.text is not None else "")
            return
        self.scheduler.advance(s, count, token)
        self.counters.generated_tokens += 1
        text = "" if s.text is None else s.text.add(token)
        logprobs = () if r.sampling.logprobs is None else (_logprob(token, row, drawn, r.sampling.logprobs),)
        if s.text is not None and s.text.stopped:
            self._finish(s, "stop", text, (token,), logprobs)
        elif s.generated >= r.max_new_tokens:
            self._finish(s, "length", text + (s.text.end() if s.text is not None else ""), (token,), logprobs)
        else:
            self._post.send(s.extra, Event((token,), text, logprobs))

    def _finish(self, s: Sequence, why: str, text: str, tokens: tuple[int, ...] = (), logprobs: Any = ()) -> None:
        self.scheduler.finish(s)
        self._end(s, why, None, text, tokens, logprobs)

    def _end(
        self, s: Sequence, why: str, error: str | None = None, text: str = "", tokens: tuple[int, ...] = (),
        logprobs: Any = (),
    ) -> None:  # fmt: skip
        """The last event of a sequence that the scheduler no longer has."""
        now, c = time.monotonic(), self.counters
        s.finish = why
        if s.adapter is not None:
            self.store.let_go(s.adapter)
        begun = now if s.scheduled is None else s.scheduled
        first = None if s.first_token is None else s.first_token - s.arrived
        usage = Usage(
            len(s.request.prompt), s.generated, s.cached, begun - s.arrived, first, now - s.arrived, s.preempted,
            s.adapter_wait,
        )  # fmt: skip
        counts = c.by_adapter[s.request.adapter or ""]
        counts[0] += 1
        counts[1] += usage.prompt_tokens
        counts[2] += usage.completion_tokens
        c.prompt_tokens += usage.prompt_tokens
        c.cached_tokens += usage.cached_tokens
        c.finished[why] += 1
        if self._last_end:
            self.pace += 0.1 * (min(now - self._last_end, 10.0) - self.pace)
        self._last_end = now
        self._post.send(s.extra, Event(tokens, text, logprobs, why, error, usage))
        with self.turn:
            self.live.pop(s.extra.id, None)
            if not self.live:
                self.turn.notify_all()

    def _fail_all(self, why: str, error: str | None) -> None:
        with self.turn:
            self.draining = True
            left = list(self.live.values())
            self.inbox.clear()
        for sequence in left:
            self._end(sequence, why, error)
        self._post.deliver()


def _logprob(token: int, row: int, drawn: Drawn, many: int) -> TokenLogprob:
    top = zip(drawn.top[row, :many].tolist(), drawn.top_logprob[row, :many].tolist(), strict=True)
    return TokenLogprob(token, float(drawn.logprob[row]), tuple(top))
