"""The process: listen, start the engine, serve, and stop without dropping anybody.

    SIGTERM, SIGINT    no new requests (503 with Retry-After); those that run end, for `drain` seconds at most; then out
    a second one       out at once

The socket is taken first, so that a port in use is found before minutes of compiling, and `/health` answers from then
on; `/ready` does when programs are compiled and adapters registered.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from lorax import serve
from lorax.errors import LoraxError
from lorax.serve.http.app import create_app
from lorax.serve.http.errors import ApiError
from lorax.serve.http.logs import log
from lorax.serve.http.protocol import protocol
from lorax.serve.http.site import Site

Progress = Callable[[int, int, str], None]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: a name or an address.
        port: 0 takes a free one.

    Raises:
        LoraxError: the port is in use, or the address is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise LoraxError(f"{host}:{port}: cannot listen there ({why}); choose another --port or --host") from None
    found.setblocking(False)
    return found


class Server(uvicorn.Server):
    """A site on a socket.

    Args:
        site: what is served.
        progress: told (done, total, what) while programs are compiled.
        on_ready: called once requests are answered.
    """

    def __init__(self, site: Site, progress: Progress | None = None, on_ready: Callable[[], None] | None = None):
        limits = site.settings
        config = uvicorn.Config(
            create_app(site),
            http=protocol(limits.header_timeout, limits.send_timeout, limits.max_connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self.site, self._progress, self._on_ready = site, progress, on_ready
        self._told: float | None = None
        self._thread = threading.Thread(target=self._start_engine, name="start", daemon=True)
        self.error: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log("listening", url=url(sockets[0]) if sockets else "", pid=os.getpid())
        self._thread.start()

    def _start_engine(self) -> None:
        """In a thread of its own: compiling takes long, and `/health` is answered meanwhile."""
        try:
            begin = time.monotonic()
            self.site.engine.start(self._progress)
            register(self.site)
            self.site.loaded = True
            log("ready", seconds=round(time.monotonic() - begin, 1), adapters=len(self.site.engine.adapters()))
            if self._on_ready is not None:
                self._on_ready()
        except Exception as error:
            self.error, self.site.trouble = error, str(error)
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self.site.metrics.sample()
        if self._told is not None:
            self.site.gate.closed = True
            late = time.monotonic() - self._told > self.site.settings.drain
            if late or not self.site.gate.inside or not self.site.loaded:
                return True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told is None:
            self._told = time.monotonic()
            log("stopping", signal=sig, running=self.site.gate.inside)
        else:
            self.should_exit = self.force_exit = True

    def serve_until_told(self, listener: socket.socket) -> None:
        """Run until a signal, or until the engine cannot start.

        Raises:
            LoraxError: what the engine said about the base, the state or an adapter.
        """
        self.run(sockets=[listener])
        if self._thread.is_alive():
            # The compiler cannot be interrupted, and a process that ends around it may crash.
            logging.shutdown()
            os._exit(0)
        self.site.engine.close()
        log("stopped")
        if self.error is not None:
            raise self.error


def register(site: Site) -> None:
    """Load the adapters that the folders hold, beside those that the engine has restored.

    One that cannot be read is told in the log, and keeps nobody from the others.
    """
    known = {info.name for info in site.engine.adapters()} | set(site.forgotten)
    for name, folder in site.folders.scan().items():
        if name in known or name == site.settings.base:
            continue
        try:
            info = site.engine.load(name, site.folders.resolve(str(folder)))
            log("adapter_loaded", level=logging.DEBUG, adapter=name, rank=info.rank)
        except (ApiError, serve.ServeError, OSError) as error:
            log("adapter_refused", level=logging.WARNING, adapter=name, error=" ".join(str(error).split()))


def url(listener: socket.socket) -> str:
    """Where a socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
