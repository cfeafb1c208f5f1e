"""`Sequence`: a request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorax.serve.prefix import Node
from lorax.serve.request import Request
from lorax.serve.text import TextStream


@dataclass(eq=False)
class Sequence:
    """A request's tokens, and which of them the pages have.

    tokens: prompt and answer so far. computed: of these, whose keys and values lie in `pages`; at least one is always
        left to compute while it runs.
    nodes: the first pages' places in the prefix cache; pages beyond are the sequence's own.
    adapter: what its weights are: the adapter's record as it was when the request came, None for the base alone.
    extra: the caller's handle. text: its text so far, for a model with a tokenizer.
    seed: of its draws. order: the number of its admission, None while it waits.
    """

    request: Request
    adapter: Any
    arrived: float
    seed: int = 0
    expires: float | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    order: int | None = None
    blocked: float | None = None
    cached: int = 0
    preempted: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    last_wait: float | None = None
    adapter_wait: float = 0.0
    cancelled: bool = False
    finish: str | None = None
    error: str | None = None
    extra: Any = None
    text: TextStream | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def digest(self) -> str:
        """What its keys and values depend on besides tokens."""
        return "" if self.adapter is None else self.adapter.digest

    @property
    def todo(self) -> int:
        """Tokens to compute before the next one is known."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt)
