"""`/v1/completions` and `/v1/chat/completions`: from a request to its answer, and what ends it early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorax.serve.http.access import caller
from lorax.serve.http.answers import Choice
from lorax.serve.http.body import read_fields
from lorax.serve.http.errors import ApiError
from lorax.serve.http.generation import Generation
from lorax.serve.http.job import Job, read_job
from lorax.serve.http.site import Site
from lorax.serve.http.stream import EventStream


async def completions(request: Request) -> Response:
    """Continue a text."""
    return await _answer(request, chat=False)


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    return await _answer(request, chat=True)


async def _answer(request: Request, chat: bool) -> Response:
    site: Site = request.app.state.site
    key = caller(request, site.keys)
    site.check_ready()
    job = await read_job(request, await read_fields(request, site.settings), key, site, chat)
    async with AsyncExitStack() as stack:
        stack.enter_context(site.gate.enter(key.name, len(job.requests)))
        generation = await stack.enter_async_context(Generation(site.engine, job.requests))
        watch = asyncio.create_task(_gone(request))
        stack.callback(watch.cancel)
        events = _noted(generation.events(), site, request.scope["state"]["notes"])
        if not job.stream:
            return await _until_gone(_whole(events, job), watch)
        first = await _until_gone(anext(events), watch)
        watch.cancel()
        return EventStream(first, events, job, stack.pop_all())


async def _gone(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _until_gone(work: Any, watch: asyncio.Task[None]) -> Any:
    """The result of `work`, unless the client goes away first: then it is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away", "client_closed_request")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _noted(events: AsyncIterator[Any], site: Site, notes: dict[str, Any]) -> AsyncIterator[Any]:
    """The events, with the log's figures and the histograms filled in on the way."""
    notes["prompt_tokens"] = notes["completion_tokens"] = 0
    async for index, event in events:
        if event.usage is not None:
            notes["prompt_tokens"] += event.usage.prompt_tokens
            notes["completion_tokens"] += event.usage.completion_tokens
            notes["finish"] = event.finish
            if event.usage.first_token is not None:
                notes["ttft_ms"] = round(1e3 * event.usage.first_token, 1)
            site.metrics.observe(event.usage)
        yield index, event


async def _whole(events: AsyncIterator[Any], job: Job) -> Response:
    choices = [Choice() for _ in job.requests]
    async for index, event in events:
        choices[index].add(event)
    return JSONResponse(job.form.whole(choices, job.echo))
