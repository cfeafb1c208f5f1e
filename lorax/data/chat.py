"""From text to tokens, with the loss exactly on what the assistant says.

The tokens that are learnt must be the tokens that generation would have to produce after the same prompt. So
the prompt is rendered as generation renders it (with the header that opens the assistant's turn), the whole
with the answer, and the answer's tokens are what the whole has beyond the prompt. Where the tokenizer joins
characters across that border the prompt's tokens are no prefix of the whole's, and the parts are encoded
apart: prompt as generation would, then answer, then end of turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from lorax.data.examples import Example, Examples, Message, Record
from lorax.errors import LoraxError


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `lorax.models.load(...).tokenizer` is one."""

    @property
    def eos_id(self) -> int | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]: ...


def encode(record: Record, tokenizer: Any, *, template: bool | None = None) -> Example:
    """One record as tokens.

    With the chat template, a plain prompt becomes a user turn and the completion the assistant's; every
    assistant turn of a conversation carries loss, its end-of-turn token (`tokenizer.eos_id`) included, and
    what a template writes after that token does not. Templates that rewrite earlier answers (some drop
    their reasoning) leave loss on the last answer alone.

    Without it, the tokens are `prompt` (after the beginning-of-sequence token, where the prompt is empty),
    then those of `completion` and the end-of-sequence token; no space is put between the two texts.

    Args:
        record: prompt and completion.
        tokenizer: see `Tokenizer`.
        template: whether to use the chat template; None uses it if the tokenizer has one.

    Raises:
        LoraxError: the tokenizer has no template and one is needed, or gives no tokens for a part.
    """
    if template is None:
        template = bool(tokenizer.chat_template)
    if template and not tokenizer.chat_template:
        raise LoraxError("the base model has no chat template; train with plain prompts (template=False)")
    try:
        return _with_template(record, tokenizer) if template else _plain(record, tokenizer)
    except LoraxError as error:
        raise LoraxError(f"{record.source}: {error}" if record.source else str(error)) from None


def encode_all(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    seq_len: int,
    template: bool | None = None,
    say: Callable[[str], None] = lambda line: warnings.warn(line, stacklevel=3),
) -> Examples:
    """Records as tokens, read once. Examples that do not fit in a row are dropped, never cut: half an answer
    is a wrong answer.

    Args:
        records: a list, a `Jsonl`, or any iterable.
        tokenizer: see `Tokenizer`.
        seq_len: positions in a row; an example of n tokens takes n - 1.
        template: as in `encode`.
        say: is told in one line how many examples were dropped, if any were; a warning by default.

    Raises:
        LoraxError: there are no records, none of them fits, or one cannot be encoded.
    """
    longest, total = [0], [0]

    def fitting():
        for record in records:
            total[0] += 1
            example = encode(record, tokenizer, template=template)
            positions = len(example.ids) - 1
            longest[0] = max(longest[0], positions)
            if positions <= seq_len:
                yield example

    examples = Examples.of(fitting())
    dropped = total[0] - len(examples)
    if not total[0]:
        raise LoraxError("the dataset is empty: there are no examples to read")
    if not len(examples):
        raise LoraxError(
            f"all {dropped} examples are longer than seq_len={seq_len} (the longest takes {longest[0]}); raise seq_len"
        )
    if dropped:
        say(
            f"dropped {dropped} of {total[0]} examples that are longer than seq_len={seq_len} "
            f"(the longest takes {longest[0]})"
        )
    return examples


def last_answer(example: Example) -> Example:
    """The same tokens with weight on the last answer alone; what was said before it is the prompt.

    Example:
        >>> last_answer(Example((1,), (5, 6, 2, 7), (1.0, 0.0, 0.0, 1.0)))
        Example(prompt_ids=(1, 5, 6, 2), completion_ids=(7,), weights=None)
    """
    if example.weights is None:
        return example
    last = max((i for i, weight in enumerate(example.weights) if weight == 0), default=-1) + 1
    return Example(example.prompt_ids + example.completion_ids[:last], example.completion_ids[last:])


def _plain(record: Record, tokenizer: Any) -> Example:
    if not isinstance(record.prompt, str):
        raise LoraxError("a conversation needs a chat template; give prompt and completion, or an instruct model")
    prompt = list(tokenizer.encode(record.prompt))
    whole = list(tokenizer.encode(record.prompt + record.completion))
    joined = prompt and whole[: len(prompt)] == prompt
    completion = whole[len(prompt) :] if joined else list(tokenizer.encode(record.completion))
    if not prompt:
        prompt = [tokenizer.bos_id if tokenizer.bos_id is not None else _end(tokenizer)]
    return Example(tuple(prompt), (*completion, _end(tokenizer)))


def _with_template(record: Record, tokenizer: Any) -> Example:
    before = record.prompt
    turns = ({"role": "user", "content": before},) if isinstance(before, str) else tuple(dict(m) for m in before)
    messages = [*turns, {"role": "assistant", "content": record.completion}]
    spans = _answer_spans(messages, tokenizer)
    if spans is None:
        prompt = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)
        return Example(tuple(prompt), (*tokenizer.encode(record.completion), _end(tokenizer)))
    ids, answers = spans
    weights = [0.0] * len(ids)
    for start, stop in answers:
        weights[start:stop] = [1.0] * (stop - start)
    first, last = answers[0][0], answers[-1][1]
    inside = tuple(weights[first:last])
    return Example(tuple(ids[:first]), tuple(ids[first:last]), None if all(inside) else inside)


def _answer_spans(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Tokens of the whole and where each answer is in them; None where answers cannot be told apart by tokens."""
    whole = _closed(tokenizer.encode_chat(messages, add_generation_prompt=False), 0, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.encode_chat(messages[:i], add_generation_prompt=True)
        upto = whole
        if i + 1 < len(messages):
            upto = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
            upto = _closed(upto, len(prompt), tokenizer)
        if not prompt or upto[: len(prompt)] != prompt or whole[: len(upto)] != upto or len(upto) == len(prompt):
            return None
        spans.append((len(prompt), len(upto)))
    return whole, spans


def _closed(ids: list[int], start: int, tokenizer: Any) -> list[int]:
    """The tokens up to the last end of turn beyond `start`; with one put there if the template writes none."""
    end = _end(tokenizer)
    for i in range(len(ids) - 1, start - 1, -1):
        if ids[i] == end:
            return list(ids[: i + 1])
    return [*ids, end]


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_id is None:
        raise LoraxError("the tokenizer names no end-of-sequence token, so the model could not learn to stop")
    return tokenizer.eos_id
