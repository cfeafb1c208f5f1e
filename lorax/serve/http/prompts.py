"""The prompt of a request as token ids: text, ids, or a conversation in the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorax.errors import LoraxError
from lorax.serve.http.errors import ApiError, invalid
from lorax.serve.http.fields import Fields

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def take_prompts(fields: Fields, most: int) -> list[str | list[int]]:
    """`prompt` of a completion: a text, a list of texts, token ids, or a list of those."""
    value = fields.take("prompt")
    if isinstance(value, str):
        found: Any = [value]
    elif isinstance(value, list) and value and all(_is_id(item) for item in value):
        found = [value]
    else:
        found = value
    good = isinstance(found, list) and all(
        isinstance(item, str) or (isinstance(item, list) and all(_is_id(i) for i in item)) for item in found
    )
    if not good or not found:
        raise invalid("prompt", "is needed: a string, token ids, or a list of either")
    if len(found) > most:
        raise invalid("prompt", f"has {len(found)} prompts; at most {most} go into one request")
    return found


def take_messages(fields: Fields) -> list[dict[str, str]]:
    """`messages` of a chat, their text alone."""
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        raise invalid("messages", "is needed, and is a list that is not empty")
    return [_message(i, item) for i, item in enumerate(value)]


def _message(index: int, item: Any) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise invalid(where, f"must have a role of {', '.join(ROLES)}")
    content = item.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise invalid(f"{where}.content", "has parts other than text, which this model does not read")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise invalid(f"{where}.content", "must be a string or a list of text parts")
    return {"role": ROLES[item["role"]], "content": content}


def encode(prompt: str | list[int], tokens: Any, vocab: int, most: int) -> tuple[int, ...]:
    """Token ids of a prompt. Slow for a long text: call it outside the event loop.

    Raises:
        ApiError: an empty prompt, ids outside the vocabulary, or more than `most` tokens.
    """
    if isinstance(prompt, str) and tokens is None:
        raise invalid("prompt", "this base has no tokenizer; send token ids")
    ids: Sequence[int] = tokens.encode(prompt) if isinstance(prompt, str) else prompt
    return _checked(ids, "prompt", vocab, most)


def encode_chat(messages: Sequence[dict[str, str]], tokens: Any, vocab: int, most: int) -> tuple[int, ...]:
    """Token ids of a conversation with the assistant's turn opened.

    Raises:
        ApiError: the model has no chat template, it refuses these messages, or more than `most` tokens.
    """
    if tokens is None or tokens.chat_template is None:
        raise invalid("messages", "this base has no chat template; use /v1/completions")
    try:
        ids = tokens.encode_chat(messages, add_generation_prompt=True)
    except LoraxError as error:
        raise invalid("messages", str(error)) from None
    return _checked(ids, "messages", vocab, most)


def _checked(ids: Sequence[int], name: str, vocab: int, most: int) -> tuple[int, ...]:
    if not ids:
        raise invalid(name, "is empty; give at least one token of text")
    if len(ids) > most:
        message = f"{name}: has {len(ids)} tokens, and at most {most} are read here; shorten it"
        raise ApiError(400, message, "context_length_exceeded", name)
    if min(ids) < 0 or max(ids) >= vocab:
        raise invalid(name, f"has token ids outside 0..{vocab - 1}")
    return tuple(ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
