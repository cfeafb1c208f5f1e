"""A request's body: JSON, of bounded size, in bounded time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from lorax.serve.http.errors import ApiError
from lorax.serve.http.fields import Fields
from lorax.serve.http.settings import Settings


async def read_fields(request: Request, settings: Settings) -> Fields:
    """The JSON object of a request.

    Raises:
        ApiError: another content type (415), too large (413), too slow (408), or not a JSON object (400).
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other pages in a user's browser from asking: a form cannot send this type.
        raise ApiError(415, "send Content-Type: application/json", "unsupported_media_type")
    raw = await _read(request, settings)
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{where}", "invalid_json") from None
    return Fields(value)


async def _read(request: Request, settings: Settings) -> bytes:
    most = settings.max_body
    too_large = ApiError(413, f"the body is larger than {most:,} bytes; shorten the prompt", "request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_timeout:g} s", "request_timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away", "client_closed_request") from None
    return bytes(raw)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
