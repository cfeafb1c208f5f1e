"""A mesh from words: `data=4,model=4`."""

from __future__ import annotations

import math
import re

from lorax.errors import LoraxError
from lorax.sharding.rules import BATCH

AXES = (*BATCH, "model")


def mesh_sizes(text: str | None, devices: int, batch: int, what: str = "this machine") -> dict[str, int]:
    """Mesh axis -> size.

    `replica` splits the batch and keeps whole copies of the weights, `data` (or `fsdp`) splits batch and weights, and
    `model` is tensor parallel. Without a text, as many devices as the batch has rows are `data` and the rest `model`.

    Args:
        text: sizes by name, or None.
        devices: how many there are; the sizes multiplied must give them.
        batch: rows of a batch; the axes that split it must divide them.
        what: whose devices they are, for messages.

    Raises:
        LoraxError: a malformed text, an axis that does not exist, or sizes that do not fit the devices or the batch.

    Example:
        >>> mesh_sizes("data=2,model=4", 8, batch=6), mesh_sizes(None, 16, batch=8)
        ({'data': 2, 'model': 4}, {'data': 8, 'model': 2})
    """
    if text is None:
        data = math.gcd(devices, batch)
        return {"data": data, "model": devices // data}
    mesh: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)=([1-9]\d{0,5})\s*", part)
        if found is None or found[1] in mesh or found[1] not in AXES:
            raise LoraxError(
                f"--mesh {text}: {part.strip()!r} is no axis; write sizes of {', '.join(AXES)}, each once, such as "
                f"data={devices},model=1"
            )
        mesh[found[1]] = int(found[2])
    if math.prod(mesh.values()) != devices:
        raise LoraxError(
            f"--mesh {text}: is {math.prod(mesh.values())} chips and {what} has {devices}; "
            "the sizes multiplied must give the chips"
        )
    rows = math.prod(size for name, size in mesh.items() if name in BATCH)
    if batch % rows:
        raise LoraxError(f"--mesh {text}: splits the batch into {rows} parts and it has {batch} rows; --batch {rows}?")
    return mesh
