"""A benchmark's workers: processes that do one thing when asked, so that two programs can take turns in one run.

Each request and each answer is one line of JSON. A worker that dies or says something else ends the run with its last
words in the message.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from lorax.errors import LoraxError


class Worker:
    """A process that answers requests, used as a context manager.

    Args:
        name: for messages.
        command: the program and its arguments.
        environment: variables on top of this process's own.

    Raises:
        LoraxError: the program does not start.

    Example:
        >>> import sys
        >>> echo = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
        >>> with Worker("echo", [sys.executable, "-c", echo]) as worker:
        ...     worker.ask(op="hello")
        {'op': 'hello'}
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.name = name
        # Open as long as the process is: closed in __exit__.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._errors.close()
            raise LoraxError(f"{name}: {command[0]} does not run ({error.strerror})") from None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            LoraxError: the worker died, or answered with an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            raise LoraxError(f"{self.name}: stopped during {request}: {self._last_words()}") from None
        if "error" in answer:
            raise LoraxError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._process.wait(timeout=60)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self._process.returncode}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """Close its input, which ends it; end it by force if it does not listen."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
