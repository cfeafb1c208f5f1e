"""OpenAI's answer objects: completions and chat completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choice:
    """What one choice has so far."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None
    usage: Any = None

    def add(self, event: Any) -> None:
        self.text += event.text
        self.logprobs += event.logprobs
        self.finish = event.finish
        self.usage = event.usage or self.usage


class Form:
    """How one endpoint writes its answers.

    Args:
        chat: `/v1/chat/completions`, else `/v1/completions`.
        model: as the request named it.
        tokens: the tokenizer, for the text of single tokens.
        top: how many likeliest tokens the request wanted; None is no log-probabilities.
        n: choices for each prompt.
    """

    def __init__(self, chat: bool, model: str, tokens: Any, top: int | None, n: int = 1):
        self._chat, self._model, self._tokens, self._top, self._n = chat, model, tokens, top, n
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice], before: Sequence[str]) -> dict[str, Any]:
        """The answer of a request that does not stream. `before` goes before the texts: echoed prompts."""
        kind = "chat.completion" if self._chat else "text_completion"
        rows = [self._row(i, c, before[i]) for i, c in enumerate(choices)]
        return {**self._head(kind), "choices": rows, "usage": usage(choices, self._n)}

    def _row(self, index: int, choice: Choice, before: str) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index, "finish_reason": choice.finish}
        if self._chat:
            row["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            row["text"] = before + choice.text
        return {**row, "logprobs": self._logprobs(choice.logprobs, 0)}

    def opening(self, index: int, before: str) -> list[dict[str, Any]]:
        """The chunks that open a choice: its role in a chat, the echoed prompt of a completion."""
        if self._chat:
            return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]
        return [self._chunk(index, {}, None, None, before)] if before else []

    def chunk(self, index: int, event: Any, offset: int) -> dict[str, Any]:
        """An event of a choice; `offset` characters of text came before it."""
        logprobs = self._logprobs(event.logprobs, offset) if event.logprobs else None
        return self._chunk(index, {"content": event.text} if event.text else {}, event.finish, logprobs, event.text)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk with the counts, for `stream_options.include_usage`."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(choices, self._n)}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: Any, text: str = "") -> Any:
        row: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": logprobs}
        row |= {"delta": delta} if self._chat else {"text": text}
        return {**self._head("chat.completion.chunk" if self._chat else "text_completion"), "choices": [row]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs(self, rows: Sequence[Any], offset: int) -> Any:
        if self._top is None:
            return None
        return self._chat_logprobs(rows) if self._chat else self._flat_logprobs(rows, offset)

    def _chat_logprobs(self, rows: Sequence[Any]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.piece(token)
            return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

        content = [
            {**entry(r.token, r.logprob), "top_logprobs": [entry(t, p) for t, p in r.top[: self._top]]} for r in rows
        ]
        return {"content": content, "refusal": None}

    def _flat_logprobs(self, rows: Sequence[Any], offset: int) -> dict[str, Any]:
        pieces = [self.piece(r.token) for r in rows]
        offsets = [offset]
        for piece in pieces[:-1]:
            offsets.append(offsets[-1] + len(piece))
        # Two tokens may read the same; the likelier one, which comes first, keeps the name.
        tops = [{self.piece(t): _finite(p) for t, p in reversed(r.top)} for r in rows]
        return {
            "tokens": pieces,
            "token_logprobs": [_finite(r.logprob) for r in rows],
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets[: len(pieces)],
        }

    def piece(self, token: int) -> str:
        """The text of one token."""
        return "" if self._tokens is None else self._tokens.decode([token], skip_special=False)


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """OpenAI's counts: what was written for all choices, and each prompt once for its `n` of them."""
    found = [choice.usage for choice in choices if choice.usage is not None]
    asked = [choice.usage for choice in choices[::n] if choice.usage is not None]
    prompt, written = sum(u.prompt_tokens for u in asked), sum(u.completion_tokens for u in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in asked)},
    }


def _finite(value: float) -> float:
    """JSON has no infinity: OpenAI writes -9999 for what cannot be drawn."""
    return max(float(value), -9999.0)
