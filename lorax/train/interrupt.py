"""Ctrl-C as a request: finish the step, save, leave with 130. A second one leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Asked(KeyboardInterrupt):
    """A first Ctrl-C, raised where the state is whole."""


class Interruptible:
    """A context in which SIGINT and SIGTERM set `asked` instead of stopping the program mid-step.

    SIGTERM counts as well: that is how clusters announce that a machine will be taken away. Outside the main
    thread, where Python cannot install handlers, nothing changes.

    Args:
        say: told once, on the first signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None] = print):
        self.asked = False
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Asked` if a signal has come. Call it where the state is whole."""
        if self.asked:
            raise Asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("interrupted: finishing this step and saving (again to leave at once)")
