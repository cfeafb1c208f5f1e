"""`Handle`: a request as its caller sees it, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

from lorax.serve.request import Event, Request


class Handle:
    """The events of one request, in order; the last one has `finish` set.

    Consume it in one way only. One that was submitted inside a running event loop is for `async for` and `wait`, others
    are for iteration and `result`.
    """

    def __init__(self, id: int, request: Request, seed: int, cancel: Callable[[Handle], None]):
        self.id, self.request, self.seed = id, request, seed
        self._cancel = cancel
        self.loop = _running_loop()
        self._events: queue.SimpleQueue[Event] | asyncio.Queue[Event]
        self._events = queue.SimpleQueue() if self.loop is None else asyncio.Queue()

    def cancel(self) -> None:
        """The client is gone: the last event follows, with finish "cancelled"."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        assert isinstance(self._events, queue.SimpleQueue), "submitted in an event loop: use `async for`"
        while True:
            event = self._events.get()
            yield event
            if event.finish is not None:
                return

    def result(self, timeout: float | None = None) -> Event:
        """All events joined into one.

        Args:
            timeout: seconds to wait for each event.

        Raises:
            TimeoutError: none came in time.
        """
        assert isinstance(self._events, queue.SimpleQueue), "submitted in an event loop: use `await handle.wait()`"
        got: list[Event] = []
        while not got or got[-1].finish is None:
            try:
                got.append(self._events.get(timeout=timeout))
            except queue.Empty:
                raise TimeoutError(f"request {self.id}: no event within {timeout} seconds") from None
        return joined(got)

    async def __aiter__(self) -> AsyncIterator[Event]:
        assert isinstance(self._events, asyncio.Queue), "submitted outside of an event loop: iterate in a thread"
        while True:
            event = await self._events.get()
            yield event
            if event.finish is not None:
                return

    async def wait(self) -> Event:
        """All events joined into one."""
        return joined([event async for event in self])

    def put(self, event: Event) -> None:
        """The engine's side: in the loop's own thread, if there is a loop."""
        if isinstance(self._events, asyncio.Queue):
            self._events.put_nowait(event)
        else:
            self._events.put(event)


class Post:
    """Events of one step on their way: one call for each event loop, however many its requests are."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Handle, Event]]] = {}

    def send(self, handle: Handle, event: Event) -> None:
        """Into the bag, or straight to a thread."""
        if handle.loop is None:
            handle.put(event)
        else:
            self._by_loop.setdefault(handle.loop, []).append((handle, event))

    def deliver(self) -> list[Handle]:
        """Hand over what is in the bag; the requests whose loop is closed."""
        gone: list[Handle] = []
        for loop, pairs in self._by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:
                gone += [handle for handle, _ in pairs]
        self._by_loop = {}
        return gone


def _put_all(pairs: list[tuple[Handle, Event]]) -> None:
    for handle, event in pairs:
        handle.put(event)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def joined(events: list[Event]) -> Event:
    """Several events of one request as one."""
    return replace(
        events[-1],
        tokens=tuple(token for event in events for token in event.tokens),
        text="".join(event.text for event in events),
        logprobs=tuple(one for event in events for one in event.logprobs),
    )
