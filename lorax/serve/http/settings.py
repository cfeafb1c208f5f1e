"""What a server allows: sizes, times, and how many at once."""

from __future__ import annotations

from dataclasses import dataclass

from lorax.errors import LoraxError


@dataclass(frozen=True)
class Settings:
    """Limits of a server. Times are seconds.

    base: the name by which requests ask for the base alone.
    max_body: bytes of a request's body.
    max_prompt: tokens of a prompt; None leaves it to the engine's own length.
    max_tokens: tokens of an answer.
    max_choices: answers to one request (prompts times `n`).
    max_requests: requests answered at the same time, waiting ones included; more get 429.
    max_requests_per_key: likewise for one key.
    max_connections: open connections; more are turned away before they are read.
    header_timeout: from a request's first byte until its head is whole.
    body_timeout: for the body after that.
    send_timeout: for a client to take what was written to it.
    drain: given to requests that run when the server is told to stop.
    hosts: names by which the server may be asked for (the Host header); None takes every name.
    """

    base: str
    max_body: int = 1 << 20
    max_prompt: int | None = None
    max_tokens: int = 4096
    max_choices: int = 16
    max_requests: int = 256
    max_requests_per_key: int = 128
    max_connections: int = 1024
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    drain: float = 30.0
    hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise LoraxError(f"{name} is {value}: a limit is above 0")
