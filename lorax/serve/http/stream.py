"""Server-sent events: an answer in chunks, as the official clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorax.serve.http.answers import Choice
from lorax.serve.http.errors import ApiError
from lorax.serve.http.job import Job

# A proxy that collects an answer before it passes it on would make a stream of it no more.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """A streamed answer that closes what it holds (the generation, its place at the gate), sent or not.

    Args:
        first, events: (choice, event); the first has been waited for, so that what fails at once has a status.
        job: what they answer.
        held: closed at the end, also when the client has gone before the first byte.
    """

    def __init__(self, first: Any, events: AsyncIterator[Any], job: Job, held: AsyncExitStack):
        self._held, self._lines = held, _lines(first, events, job)
        super().__init__(self._lines, media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()
            await self._held.aclose()


async def _lines(first: Any, events: AsyncIterator[Any], job: Job) -> AsyncGenerator[str, None]:
    choices = [Choice() for _ in job.requests]
    opened: set[int] = set()
    try:
        async for index, event in _again(first, events):
            choice = choices[index]
            if index not in opened:
                opened.add(index)
                for chunk in job.form.opening(index, job.echo[index]):
                    yield _line(job, chunk)
                choice.text = job.echo[index]
            offset = len(choice.text)
            choice.add(event)
            if event.text or event.logprobs or event.finish:
                yield _line(job, job.form.chunk(index, event, offset))
        if job.count:
            yield _line(job, job.form.last(choices))
    except ApiError as error:
        # The status is long sent; the official clients raise what they find here.
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _again(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _line(job: Job, chunk: dict[str, Any]) -> str:
    if job.count:
        chunk.setdefault("usage", None)
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
