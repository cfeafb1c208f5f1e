"""What a caller of the engine can do wrong, and what the engine can refuse: one class for each answer."""

from __future__ import annotations

from lorax.errors import LoraxError


class ServeError(LoraxError):
    """Anything that the engine refuses; the message is one line for the user."""


class BadRequest(ServeError):
    """A request that can never be served as it is: an empty prompt, a setting out of range, too many tokens."""


class UnknownAdapter(ServeError):
    """No adapter of this name is registered.

    name: the one that was asked for.
    """

    def __init__(self, name: str, known: list[str]):
        listed = ", ".join(sorted(known))[:200] or "none"
        super().__init__(f"no adapter {name!r} is loaded; there are: {listed}")
        self.name = name


class Busy(ServeError):
    """The queue is full.

    retry_after: seconds after which there should be room, at least one.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class Draining(ServeError):
    """The engine is ending, or has not started, and takes no new requests."""


# reason -> what it means
REASONS = {
    "missing": "no such folder, or no adapter in it",
    "corrupt": "a file is damaged",
    "wrong_base": "it was trained over another base",
    "too_large": "its rank, or its pages, are above what this engine takes",
    "exists": "the name is taken",
    "unsupported": "it changes something that is not a linear map inside a layer",
    "io": "the disk refuses",
}


class AdapterError(ServeError):
    """An adapter that cannot be loaded.

    reason: one of `REASONS`.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        assert reason in REASONS
        self.reason = reason
