"""How many requests are answered at once: in all, and for each key. What comes above is told when to come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lorax.serve.http.errors import ApiError


class Gate:
    """Counts the requests that are inside. Used from the event loop alone.

    Example:
        >>> gate = Gate(most=8, most_per_key=1)
        >>> with gate.enter("alice"), gate.enter("bob"):
        ...     gate.inside
        2
    """

    def __init__(self, most: int, most_per_key: int):
        self._most, self._most_per_key = most, most_per_key
        self._by_key: Counter[str] = Counter()
        self.inside = 0
        self.closed = False

    @contextmanager
    def enter(self, key: str, count: int = 1) -> Iterator[None]:
        """Be inside for the length of the block, as `count` requests.

        Raises:
            ApiError: 429 above a limit, 503 while the server is stopping.
        """
        if self.closed:
            raise ApiError(503, "the server is stopping; try again elsewhere", "stopping", retry_after=1)
        if self.inside + count > self._most:
            raise ApiError(429, f"more than {self._most} requests at once; try again", "overloaded", retry_after=1)
        if self._by_key[key] + count > self._most_per_key:
            most = self._most_per_key
            raise ApiError(429, f"more than {most} requests at once with this key", "rate_limited", retry_after=1)
        self.inside += count
        self._by_key[key] += count
        try:
            yield
        finally:
            self.inside -= count
            self._by_key[key] -= count
            if not self._by_key[key]:
                del self._by_key[key]
