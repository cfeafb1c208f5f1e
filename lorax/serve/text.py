"""Tokens to text as they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens that are decoded anew with each new one: a few, so that the new one is joined as it should be. They are cut
# down to the smaller number when they are more than the larger.
CONTEXT, MOST = 4, 16
# What a tokenizer shows for bytes that are no whole character yet.
PARTIAL = "�"


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: has `decode(ids)`.
        prompt: its last tokens decide how the first ones of the answer are joined to it.
        stops: texts that end the answer.

    Example:
        >>> import tokenizers
        >>> from lorax.models.tokenizer import Tokenizer
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
        >>> stream = TextStream(Tokenizer(inner), [0], ["c"])
        >>> stream.add(1), stream.add(2), stream.stopped
        (' b', ' ', True)
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]):
        self._decode, self._stops = tokenizer.decode, tuple(stops)
        # The text of a few tokens before the new ones: what is longer with them is new.
        self._ids = list(prompt[-CONTEXT:])
        self._known = self._decode(self._ids)
        self._fresh: list[int] = []
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        self._fresh.append(token)
        return self._show(self._new())

    def end(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        if self.stopped:
            return ""
        text = self._held + (self._decode([*self._ids, *self._fresh])[len(self._known) :] if self._fresh else "")
        self._held, self._fresh = "", []
        return text

    def _new(self) -> str:
        text = self._decode([*self._ids, *self._fresh])
        if text.endswith(PARTIAL) and len(self._fresh) < 8:
            return ""
        new = text[len(self._known) :]
        self._ids, self._known, self._fresh = [*self._ids, *self._fresh], text, []
        if len(self._ids) > MOST:
            self._ids = self._ids[-CONTEXT:]
            self._known = self._decode(self._ids)
        return new

    def _show(self, new: str) -> str:
        text = self._held + new
        if not self._stops:
            return text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that a stop string begins with.
        most = max(map(len, self._stops)) - 1
        keep = next((n for n in range(min(most, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
