"""What the commands that read a model have in common: a base, and perhaps something trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lorax.errors import LoraxError

DEFAULT_BASE = "smollm2-135m"


class Source(NamedTuple):
    """A base by name, and the folder of an adapter over it (None for the base alone)."""

    base: str
    adapter: Path | None


def find(base: str | None, adapter: str | None) -> Source:
    """Settle which base and which adapter are meant.

    `adapter` may be an adapter's folder or a run's folder. A run that trained whole weights has no adapter:
    its `model/` is then the base. Without `base`, the one that the run or the adapter names is taken.

    Raises:
        LoraxError: the folder holds nothing of the kind.
    """
    if adapter is None:
        return Source(base or DEFAULT_BASE, None)
    folder = Path(adapter)
    if not folder.is_dir():
        raise LoraxError(f"{folder}: no such folder (--adapter takes a run's folder or an adapter's)")
    if (folder / "adapter_config.json").is_file():
        return Source(base or _named_by(folder.parent / "run.json", folder / "adapter_config.json"), folder)
    if (folder / "adapter" / "adapter_config.json").is_file():
        return Source(
            base or _named_by(folder / "run.json", folder / "adapter" / "adapter_config.json"),
            folder / "adapter",
        )
    if (folder / "model" / "config.json").is_file():
        return Source(str(folder / "model"), None)
    raise LoraxError(f"{folder}: holds neither adapter_config.json nor a finished run")


def open_model(source: Source) -> tuple[Any, Any]:
    """Load a source: the model, and its parameters with the adapter over them if there is one."""
    from lorax import load_adapter
    from lorax.models import load

    model = load(source.base)
    if source.adapter is None:
        return model, model.params
    return model, load_adapter(source.adapter, model.params)


def _named_by(record: Path, config: Path) -> str:
    """The base that a run's record names, else the adapter's own configuration, else the default."""
    for path, keys in ((record, ("config", "base")), (config, ("base_model_name_or_path",))):
        try:
            value = json.loads(path.read_text())
            for key in keys:
                value = value[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(value, str) and value:
            return value
    return DEFAULT_BASE
