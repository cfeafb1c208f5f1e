"""`PagePool`: who has which page. Numbers only; the pages themselves are an array on the device.

pages = free + owned            a page is in one of them, once; page 0 is in neither
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out pages of a pool.

    Args:
        pages: how many there are, with page 0, which is never handed out.

    Example:
        >>> pool = PagePool(4)
        >>> pool.take(2), pool.free, pool.take(2)
        ([1, 2], 1, None)
    """

    def __init__(self, pages: int):
        # A stack: pages that were used last are likelier to be in a cache.
        self._free = list(range(pages - 1, 0, -1))
        self._owned = bytearray(pages)
        self.pages = pages - 1

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many pages, or None (and nothing taken) where there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owned[page] = 1
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Pages back.

        Raises:
            AssertionError: one that nobody has.
        """
        for page in pages:
            assert self._owned[page], f"page {page} was given back twice"
            self._owned[page] = 0
            self._free.append(page)
