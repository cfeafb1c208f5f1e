"""From checked fields to running requests, and their events as they come.

One HTTP request may be several of the engine's: every prompt, `n` times. They are submitted together or not at all, and
however the HTTP request ends (done, failed, the client gone), what still runs is cancelled.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lorax import serve
from lorax.serve.http.errors import ApiError, invalid
from lorax.serve.http.fields import Fields
from lorax.serve.http.logs import log


def sampling(fields: Fields, logprobs: int | None) -> serve.Sampling:
    """The sampling fields: OpenAI's, and those that other servers have added (top_k, min_p, repetition_penalty)."""
    top_k = fields.integer("top_k", 0, -1, 1 << 20)
    seed = fields.take("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise invalid("seed", "must be a whole number of 64 bits")
    return serve.Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_k=max(top_k, 0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above=True),
        min_p=_below_one(fields.number("min_p", 0.0, 0.0, 1.0)),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, 10.0, above=True),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        seed=None if seed is None else seed % 2**31,
        logprobs=logprobs,
    )


def template(fields: Fields, adapter: str | None, tenant: str, admin: bool, default: int | None, most: int) -> Any:
    """A request without its prompt.

    Args:
        fields: of the HTTP request; the ones that every endpoint has are taken.
        adapter: whom it is for.
        tenant: between whom the engine is fair.
        admin: whether it may go before others.
        default: longest answer when the request says nothing; None is as long as the engine's length allows.
        most: longest answer that a request may ask for.
    """
    old, new = fields.take("max_tokens"), fields.take("max_completion_tokens")
    longest = Fields({"max_tokens": old if new is None else new}).integer("max_tokens", 0, 1, most)
    priority = fields.integer("priority", 0, -1000, 1000)
    if priority > 0 and not admin:
        raise ApiError(403, "priority: above 0 needs an admin key", "admin_key_needed", "priority")
    deadline = fields.number("deadline", 0.0, 0.0, 86400.0)
    return serve.Request(
        prompt=(),
        adapter=adapter,
        max_new_tokens=longest or default or 0,
        stop=fields.texts("stop", most=8, longest=256),
        stop_ids=fields.integers("stop_token_ids", most=64),
        ignore_eos=fields.flag("ignore_eos"),
        tenant=tenant,
        priority=priority,
        deadline=deadline or None,
    )


class Generation:
    """Requests of the engine that answer one HTTP request, an async context manager.

    Args:
        engine: the engine.
        requests: one for each choice, in their order.
    """

    def __init__(self, engine: Any, requests: Sequence[serve.Request]):
        self._engine, self._requests = engine, requests
        self._handles: list[Any] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def __aenter__(self) -> Generation:
        try:
            for request in self._requests:
                self._handles.append(self._engine.submit(request))
        except serve.ServeError as error:
            self._cancel()
            raise refusal(error) from None
        self._pumps = [asyncio.create_task(self._pump(i, handle)) for i, handle in enumerate(self._handles)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    async def _pump(self, index: int, handle: Any) -> None:
        try:
            async for event in handle:
                self._events.put_nowait((index, event))
        except Exception as error:
            # Handed over, and raised where the request is: this task's own exception nobody would see.
            self._events.put_nowait((index, error))

    async def events(self) -> AsyncIterator[tuple[int, Any]]:
        """(choice, event) as they come, until each choice has had its last.

        Raises:
            ApiError: the engine could not go on with one of them.
        """
        left = len(self._handles)
        while left:
            index, event = await self._events.get()
            if isinstance(event, Exception):
                raise ApiError(500, f"the engine stopped: {event}", "engine_failed") from event
            if event.finish is not None:
                left -= 1
                self._check(event, self._requests[index])
            yield index, event

    def _check(self, event: Any, request: serve.Request) -> None:
        """Raise what kept a request from its end. Why an adapter cannot be read is for the log: it names the disk."""
        if event.finish == "error":
            log("request_failed", level=logging.ERROR, adapter=request.adapter, error=event.error)
            whole = not (event.error or "").startswith("the engine failed")
            if request.adapter is not None and whole and self._engine.ready:
                why = "its files are gone or damaged, or the disk fails; others are served"
                raise ApiError(503, f"the adapter {request.adapter!r} cannot be read now: {why}", "adapter_unavailable")
            raise ApiError(500, "the engine failed; the server's log says why", "engine_failed")
        if event.finish == "deadline":
            raise ApiError(504, "the request's deadline passed before its answer was complete", "deadline_exceeded")
        if event.finish == "cancelled":
            raise ApiError(503, "the server is stopping; try again elsewhere", "stopping", retry_after=1)


def refusal(error: serve.ServeError) -> ApiError:
    """The engine's refusal as an answer."""
    if isinstance(error, serve.Busy):
        return ApiError(429, str(error), "overloaded", retry_after=error.retry_after)
    if isinstance(error, serve.UnknownAdapter):
        # The engine's own message lists the others, which are not everybody's to know.
        return ApiError(404, f"there is no adapter {error.name[:128]!r} here", "model_not_found", "model")
    if isinstance(error, serve.Draining):
        return ApiError(503, str(error), "stopping", retry_after=1)
    if isinstance(error, serve.AdapterError):
        status = {"missing": 404, "exists": 409, "io": 503}.get(error.reason, 400)
        return ApiError(status, str(error), f"adapter_{error.reason}", "lora_path")
    return ApiError(400, str(error), "invalid_value")


def with_seed(request: serve.Request, choice: int) -> serve.Request:
    """The request for one of `n` choices: each draws with a seed of its own, the first with the one that was given."""
    own = request.sampling.seed
    if own is None or choice == 0:
        return request
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=(own + choice) % 2**31))


def _below_one(value: float) -> float:
    if value >= 1.0:
        raise invalid("min_p", "must be below 1")
    return value
