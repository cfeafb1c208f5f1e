"""The fields of a JSON request, each taken once, checked, and told by name when it is wrong.

What is left over at the end is an error: a misspelt `temprature` would otherwise change nothing and say nothing.
"""

from __future__ import annotations

import math
from typing import Any

from lorax.serve.http.errors import ApiError, invalid

# Sent by clients and frameworks for other purposes; they change no answer.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}

# OpenAI's, without a meaning here: refused by name unless they ask for nothing.
NOTHING = (None, [], {}, "", False, "none", {"type": "text"}, ["text"])
UNSUPPORTED = {
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "logit_bias",
    "suffix",
    "audio",
    "modalities",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
}


class Fields:
    """A JSON object that gives its fields away.

    Example:
        >>> f = Fields({"n": 2, "top_p": 0.5})
        >>> f.integer("n", 1, least=1, most=8), f.number("top_p", 1.0, 0.0, 1.0), f.flag("stream")
        (2, 0.5, False)
        >>> f.finish()
    """

    def __init__(self, values: Any):
        if not isinstance(values, dict):
            raise ApiError(400, "the body is not a JSON object", "invalid_json")
        self._left: dict[str, Any] = dict(values)

    def take(self, name: str) -> Any:
        """The raw value, None where it is absent."""
        return self._left.pop(name, None)

    def text(self, name: str, default: str | None = None) -> str:
        """A string, required unless it has a default."""
        value = self.take(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise invalid(name, "is needed, and is a string that is not empty")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(name, f"is {_shown(value)}; must be true or false")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number between bounds."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(name, f"is {_shown(value)}; must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float, above: bool = False) -> float:
        """A number between bounds; `above` leaves the lower one out."""
        value = self.take(name)
        if value is None:
            return default
        real = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not real or not least <= value <= most or (above and value == least):
            edge = f"above {least:g} and at most" if above else f"from {least:g} to"
            raise invalid(name, f"is {_shown(value)}; must be a number {edge} {most:g}")
        return float(value)

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.take(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise invalid(name, "must be a string or a list of strings")
        if len(found) > most or not all(1 <= len(item) <= longest for item in found):
            raise invalid(name, f"must be at most {most} strings of 1 to {longest} characters")
        return tuple(found)

    def integers(self, name: str, most: int) -> tuple[int, ...]:
        """A list of token ids."""
        value = self.take(name)
        found = [] if value is None else value
        if not isinstance(found, list) or not all(_is_token(item) for item in found) or len(found) > most:
            raise invalid(name, f"must be a list of at most {most} token ids")
        return tuple(found)

    def finish(self) -> None:
        """Refuse what is left over.

        Raises:
            ApiError: names the first field that is not known here.
        """
        for name, value in self._left.items():
            if name in HARMLESS or (name in UNSUPPORTED and value in NOTHING):
                continue
            if name in UNSUPPORTED:
                raise ApiError(400, f"{name[:80]}: is not supported here; leave it out", "unsupported_parameter", name)
            raise ApiError(400, f"{name[:80]}: is no field of this request", "unknown_parameter", name[:80])


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
