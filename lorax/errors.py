"""The one error type that a user of lorax is meant to read."""

from __future__ import annotations


class LoraxError(ValueError):
    """A mistake in the input, said in one line: the thing, the place (parameter path, file, line) and the way out.

    The command line prints the message without a traceback and exits with code 2. Everything that is not a
    `LoraxError` is a fault of lorax itself and keeps its traceback.
    """
