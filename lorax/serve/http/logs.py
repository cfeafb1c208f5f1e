"""Logs as JSON, a line an event. Prompts, answers and keys are in none of them."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, TextIO

LOGGER = logging.getLogger("lorax.serve")


class JsonLines(logging.Formatter):
    """A record as one line: `time`, `level`, `event`, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        line["event"] = record.getMessage() if fields is not None else "log"
        line |= fields if fields is not None else {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(stream: TextIO | None = None, level: str = "INFO") -> None:
    """Send the server's logs, uvicorn's among them, to a stream (standard error)."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    for name in ("lorax.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler] if name != "uvicorn.error" else [], name == "uvicorn.error"
        logger.setLevel(level if name == "lorax.serve" else "WARNING")


def log(event: str, level: int = logging.INFO, exc_info: Any = None, **fields: Any) -> None:
    """Write an event with its fields."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=exc_info)
