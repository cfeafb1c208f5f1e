"""What goes into the engine and what comes out: requests, how to sample, events."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lorax.serve.errors import BadRequest

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 8, 256


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: penalties, then temperature, then top-k, top-p and min-p in this order.

    temperature: 0 takes the likeliest token.
    top_k: only so many of the likeliest; 0 for all.
    top_p: only the likeliest that together have this probability.
    min_p: only tokens with at least this share of the likeliest one's probability.
    repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative ones multiplied.
    presence_penalty, frequency_penalty: taken from the logit of a token that is in the answer: once, and for each time.
    seed: of the draws; they depend on it and on the token's place alone. None lets the engine choose.
    logprobs: how many of the likeliest tokens to report at each place, besides the chosen one; None for nothing.

    Sources: Keskar et al. 2019 (repetition penalty), Fan et al. 2018 (top-k), Holtzman et al. 2019 (top-p), Nguyen et
    al. 2024 (min-p).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    def check(self) -> None:
        """Raises:
        BadRequest: a setting is out of range; names it.
        """
        _within("temperature", self.temperature, 0.0, 1e4)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0, below=True)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 1e4, above=True)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.top_k < 0:
            raise BadRequest(f"top_k is {self.top_k}; it must be at least 0, which means all tokens")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise BadRequest(f"logprobs is {self.logprobs}; it must be from 0 to {MAX_LOGPROBS}")

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens matter."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _within(name: str, value: float, low: float, high: float, above: bool = False, below: bool = False) -> None:
    good = math.isfinite(value) and low <= value <= high and not (above and value == low)
    if not good or (below and value == high):
        raise BadRequest(f"{name} is {value}; it must be {'above' if above else 'at least'} {low:g} and "
                         f"{'below' if below else 'at most'} {high:g}")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids.
    adapter: a registered name; None for the base alone.
    max_new_tokens: the answer ends there at the latest.
    stop: the text ends before the first of these.
    stop_ids: tokens that end the answer, besides the model's own.
    ignore_eos: go on after the model's end token, which is then a token like others.
    tenant: fairness is between tenants.
    priority: higher goes first.
    deadline: seconds from submission after which it is given up.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    max_new_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None

    def check(self, vocab_size: int, max_length: int) -> None:
        """Raises:
        BadRequest: the request can never be served; says why.
        """
        if not self.prompt:
            raise BadRequest("the prompt has no tokens; give at least one")
        if self.max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if len(self.prompt) + self.max_new_tokens > max_length:
            raise BadRequest(
                f"{len(self.prompt)} tokens of prompt and {self.max_new_tokens} of answer are more than the "
                f"{max_length} that this engine takes; shorten one of them"
            )
        if min(self.prompt) < 0 or max(self.prompt) >= vocab_size:
            raise BadRequest(f"the prompt has a token outside the vocabulary of {vocab_size}")
        if len(self.stop) > MAX_STOPS or not all(1 <= len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise BadRequest(f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        if self.deadline is not None and not self.deadline > 0:
            raise BadRequest(f"deadline is {self.deadline}; it must be above 0 seconds")
        self.sampling.check()


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token under softmax(logits), before penalties and temperature.

    top: the likeliest tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a request took.

    cached_tokens: of the prompt, whose keys and values were there already.
    queued: seconds until it was first scheduled. adapter_wait: of those, waiting for its adapter's weights.
    first_token: seconds until the first token; None if there was none.
    total: seconds until it ended.
    preempted: how often it was put back and computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued: float
    first_token: float | None
    total: float
    preempted: int
    adapter_wait: float


@dataclass(frozen=True)
class Event:
    """New tokens of a request, or its end.

    tokens: without the one that ended it.
    text: whole characters; what may be the beginning of a stop string is held back.
    finish: on the last event "stop", "length", "cancelled", "deadline" or "error", else None.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: str | None = None
    usage: Usage | None = None
