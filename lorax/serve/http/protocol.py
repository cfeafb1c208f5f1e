"""HTTP/1.1 on one connection, with a clock: a client that sends slowly holds its own connection for seconds, no longer.

Uvicorn times connections that are idle between requests. What it leaves open are a head that never ends (slow-loris), a
body that goes on after its answer was given, and a client that does not read what is written to it. The first two get a
deadline here that further bytes do not move, the third is cut off.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorax.serve.http.errors import ApiError


def protocol(header_timeout: float, send_timeout: float, max_connections: int) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    Args:
        header_timeout: seconds for a head, and for the rest of a body that nobody waits for.
        send_timeout: seconds for a client to take what was written, once the buffers towards it are full.
        max_connections: open connections; what comes above is answered 503 at once, unread.
    """

    class Timed(_Timed):
        limit, patience, most = header_timeout, send_timeout, max_connections

    return Timed


class _Timed(H11Protocol):
    limit: float
    patience: float
    most: int
    _deadline: asyncio.TimerHandle | None = None
    _full: asyncio.TimerHandle | None = None
    _state: tuple[Any, Any] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(ApiError(503, "too many open connections; try again", "overloaded", retry_after=1))
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._taken()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            # In the middle of a head, or after an error, there is nothing to say goodbye to.
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def _taken(self) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def _watch(self) -> None:
        """Start, leave or stop the clock by what the two sides of the connection wait for."""
        state = (self.conn.our_state, self.conn.their_state)
        head = self.conn.their_state is h11.IDLE
        # Between requests uvicorn's own timer runs, until a byte comes.
        quiet = head and self.timeout_keep_alive_task is not None
        rest = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if quiet or not (head or rest):
            self._stop()
        elif self._deadline is None or state != self._state:
            self._stop()
            self._deadline = self.loop.call_later(self.limit, self._too_slow)
        self._state = state

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, f"the request's head did not arrive within {self.limit:g} s", "request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        head.append((b"connection", b"close"))
        if error.retry_after is not None:
            head.append((b"retry-after", str(int(error.retry_after)).encode()))
        events = [h11.Response(status_code=error.status, headers=head), h11.Data(data=body), h11.EndOfMessage()]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
