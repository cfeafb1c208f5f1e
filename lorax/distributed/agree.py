"""What all processes must see alike: one waits for the other, one decides, one writes and tells how it went.

Each of these is a meeting: every process must come to it, in the same order. In one process alone all of them are free.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lorax.errors import LoraxError


def barrier(name: str) -> None:
    """Wait until every process is here.

    Args:
        name: the same in all of them; processes that wait for different things are an error.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process.

    Example:
        >>> any_process(True)
        True
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_main(value: Any) -> Any:
    """Process 0's value (anything JSON takes) in all of them.

    Example:
        >>> from_main({"step": 3})
        {'step': 3}
    """
    if jax.process_count() == 1:
        return value
    main = jax.process_index() == 0
    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if main else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(data.size, np.int32)))
    sent = multihost_utils.broadcast_one_to_all(data if main else np.zeros(size, np.uint8))
    return json.loads(np.asarray(sent, np.uint8).tobytes())


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns in process 0 (anything JSON takes), which alone runs it; an error there is one in all.

    Raises:
        LoraxError: in every process, if process 0 raised it.

    Example:
        >>> on_main(lambda: 1 + 1)
        2
    """
    if jax.process_count() == 1:
        return function()
    error: Exception | None = None
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"value": function()}
        except Exception as raised:  # told to the others first, then raised here
            error, said = raised, {"error": str(raised)}
    said = from_main(said)
    if error is not None:
        raise error
    if "error" in said:
        raise LoraxError(f"process 0: {said['error']}")
    return said["value"]
