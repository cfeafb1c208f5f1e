"""What a benchmark says about the machine and the versions that its figures belong to, and where it writes them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from lorax.io.atomic import write_json


def machine() -> dict[str, Any]:
    """The processor, its cores, memory and system.

    Example:
        >>> sorted(machine())
        ['cores', 'memory_bytes', 'processor', 'system']
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a step's speed."""
    names = ("lorax-flax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def write(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    write_json(path, result)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
