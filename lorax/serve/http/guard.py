"""Around every request: a number for it, its line in the log, and errors as JSON."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax.serve.http.errors import ApiError
from lorax.serve.http.logs import log
from lorax.serve.http.settings import Settings

# Asked every few seconds by machines; neither success nor "not yet" is news.
QUIET = ("/health", "/ready", "/metrics")


class Guard:
    """ASGI middleware.

    Whatever goes wrong inside becomes OpenAI's JSON form. The Host header must be one of the server's names: a page in
    a browser that points its own name at this machine (DNS rebinding) is turned away.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Any):
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, number = time.monotonic(), f"req-{uuid.uuid4().hex}"
        notes: dict[str, Any] = {"id": number, "method": scope["method"], "path": scope["path"][:200]}
        scope.setdefault("state", {})["notes"] = notes
        answer = _Answer(send, number)
        try:
            self._check_host(scope)
            await self.app(scope, receive, answer.send)
        except ApiError as error:
            await answer.error(error, scope, receive)
        except asyncio.CancelledError:
            notes["error"] = "stopped with the server"
            raise
        except Exception as error:
            log("failure", level=40, exc_info=error, id=number)
        finally:
            self._note(scope, answer, notes, time.monotonic() - begin)

    def _check_host(self, scope: Scope) -> None:
        if self.settings.hosts is None:
            return
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        name = values[0].rsplit("]", 1)[0] + "]" if values and values[0].startswith("[") else "".join(values[:1])
        bare = name if name.startswith("[") else name.split(":")[0]
        if bare.lower() not in self.settings.hosts:
            raise ApiError(421, f"this server is not called {bare[:80]!r}; see --allow-host", "wrong_host")

    def _note(self, scope: Scope, answer: _Answer, notes: dict[str, Any], seconds: float) -> None:
        status = answer.status or 499
        self.count(scope["path"], status)
        if scope["path"] in QUIET and status in (200, 503):
            return
        log("request", level=20 if status < 500 else 40, status=status, ms=round(1e3 * seconds, 1), **notes)


class _Answer:
    """The sending half of a request, and its status."""

    def __init__(self, send: Send, number: str):
        self._send, self._number, self.status = send, number, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._number.encode())]
        await self._send(message)

    async def error(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        # An answer that has begun cannot become another one: uvicorn closes the connection, so it is seen to be short.
        if not self.status:
            await error.response()(scope, receive, self.send)
