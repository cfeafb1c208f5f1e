"""A completion request, checked: what to submit to the engine, and how its answer is to be written."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from lorax.serve.http.access import adapter_of
from lorax.serve.http.answers import Form
from lorax.serve.http.errors import ApiError, invalid
from lorax.serve.http.fields import Fields
from lorax.serve.http.generation import sampling, template, with_seed
from lorax.serve.http.keys import Key
from lorax.serve.http.prompts import encode, encode_chat, take_messages, take_prompts
from lorax.serve.http.site import Site


@dataclasses.dataclass(frozen=True)
class Job:
    """What a checked request comes to.

    requests: one for each choice.
    form: how its answer is written.
    stream, count: whether it is streamed, and whether the counts come at the stream's end.
    echo: what goes before each choice's text.
    """

    requests: list[Any]
    form: Form
    stream: bool
    count: bool
    echo: list[str]


async def read_job(request: Request, fields: Fields, key: Key, site: Site, chat: bool) -> Job:
    """Check every field, and read the prompts into tokens outside the event loop.

    Raises:
        ApiError: names the field and what it should be.
    """
    settings, engine = site.settings, site.engine
    model = fields.text("model")
    request.scope["state"]["notes"]["model"] = model[:128]
    adapter = adapter_of(model, key, settings.base, engine)
    top = _chat_logprobs(fields) if chat else _logprobs(fields)
    draw = sampling(fields, top)
    tenant = key.name if site.keys.required else model
    free = key.admin or not site.keys.required
    asked = template(fields, adapter, tenant, free, None if chat else 16, settings.max_tokens)
    n = fields.integer("n", 1, 1, settings.max_choices)
    if fields.integer("best_of", n, 1, settings.max_choices) != n:
        raise invalid("best_of", "must be n: every answer is given back")
    stream, count = fields.flag("stream"), _counts(fields)
    echo = not chat and fields.flag("echo")
    if echo and top is not None:
        raise invalid("echo", "goes without logprobs: those of the prompt are not computed")
    sources: Sequence[Any] = [take_messages(fields)] if chat else take_prompts(fields, settings.max_choices // n or 1)
    fields.finish()
    vocab, most = engine.model.config.vocab_size, min(settings.max_prompt or engine.max_length, engine.max_length - 1)
    read: Any = encode_chat if chat else encode
    prompts = [await asyncio.to_thread(read, source, engine.tokenizer, vocab, most) for source in sources]
    asked = dataclasses.replace(asked, sampling=draw)
    each = [_with_prompt(asked, prompt, engine.max_length, settings.max_tokens) for prompt in prompts]
    requests = [with_seed(one, choice) for one in each for choice in range(n)]
    before = [_text(source, engine.tokenizer) if echo else "" for source in sources for _ in range(n)]
    return Job(requests, Form(chat, model, engine.tokenizer, top, n), stream, count, before)


def _with_prompt(asked: Any, prompt: tuple[int, ...], length: int, most: int) -> Any:
    """The request with its prompt; the answer is as long as there is room for, where nothing was said."""
    room = length - len(prompt)
    longest = asked.max_new_tokens or min(room, most)
    if longest > room:
        message = f"max_tokens: {longest} after a prompt of {len(prompt)} tokens is more than the {length} here"
        raise ApiError(400, message, "context_length_exceeded", "max_tokens")
    return dataclasses.replace(asked, prompt=prompt, max_new_tokens=longest)


def _text(source: Any, tokens: Any) -> str:
    return source if isinstance(source, str) else "" if tokens is None else tokens.decode(source)


def _counts(fields: Fields) -> bool:
    options = fields.take("stream_options")
    inner = Fields({} if options is None else options)
    count = inner.flag("include_usage")
    inner.flag("include_obfuscation")
    inner.finish()
    return count


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, 20)
    if top and not wanted:
        raise invalid("top_logprobs", "needs logprobs: true")
    return top if wanted else None


def _logprobs(fields: Fields) -> int | None:
    value = fields.take("logprobs")
    if value is None or value is False:
        return None
    return Fields({"logprobs": 1 if value is True else value}).integer("logprobs", 0, 0, 20)
