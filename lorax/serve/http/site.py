"""What the handlers of one server share."""

from __future__ import annotations

from typing import Any

from lorax.serve.http.errors import ApiError
from lorax.serve.http.folders import Folders
from lorax.serve.http.forgotten import Forgotten
from lorax.serve.http.gate import Gate
from lorax.serve.http.keys import Keys
from lorax.serve.http.metrics import Metrics
from lorax.serve.http.settings import Settings


class Site:
    """An engine, and what surrounds it.

    Args:
        engine: an engine of `lorax.serve`, started or not.
        settings: limits.
        keys: who may ask.
        folders: where adapters may come from.
        forgotten: names that a restart must not find again.
    """

    def __init__(
        self, engine: Any, settings: Settings, keys: Keys, folders: Folders, forgotten: Forgotten | None = None
    ):
        self.engine, self.settings, self.keys, self.folders = engine, settings, keys, folders
        self.gate = Gate(settings.max_requests, settings.max_requests_per_key)
        self.metrics = Metrics(engine)
        self.forgotten = Forgotten() if forgotten is None else forgotten
        self.loaded = False
        self.trouble: str | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are answered: compiled, adapters registered, not stopping."""
        return self.loaded and bool(self.engine.ready) and not self.gate.closed

    @property
    def failed(self) -> bool:
        """Whether the engine could not start, or ended by itself: only a restart helps."""
        return self.trouble is not None or (self.loaded and not self.engine.ready and not self.gate.closed)

    def why_not(self) -> str:
        """One line about what is in the way."""
        if self.gate.closed:
            return "the server is stopping"
        if self.failed:
            return f"the engine stopped: {self.trouble or self.engine.failure or 'the log says why'}"
        return "the server is starting: programs are compiled, adapters read"

    def check_ready(self) -> None:
        """Refuse a request that cannot be served now.

        Raises:
            ApiError: 503.
        """
        if not self.ready:
            raise ApiError(503, f"{self.why_not()}; try again", "not_ready", retry_after=2)
