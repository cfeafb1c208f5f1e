"""What the commands that read a model have in common: a base, and perhaps something trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lorax.errors import LoraxError

DEFAULT_BASE = "smollm2-135m"


class Source(NamedTuple):
    """A base by name, the folder of an adapter over it (None for the base alone), and the run that made it.

    trained: the settings of the run, where the adapter lies in one.
    loftq: whether LoftQ fitted the adapter to its quantised base.
    own: whether that base is one of the run's own, in few bits as it lies there.
    """

    base: str
    adapter: Path | None
    trained: dict[str, Any] = {}  # noqa: RUF012 - never written to
    loftq: bool = False
    own: bool = False

    @property
    def original(self) -> str | None:
        """The base before it was quantised; None where only the run knew."""
        return self.trained.get("base") if self.own else self.base

    @property
    def quantised(self) -> bool:
        """Whether the adapter was trained over a base in few bits."""
        return self.trained.get("method") == "qlora"

    @property
    def dtype(self) -> str:
        """Of the weights and of the arithmetic."""
        return self.trained.get("dtype", "float32")

    def spec(self) -> Any:
        """How the base was packed while it was loaded for training; None if it was not."""
        if self.own or not (self.quantised or self.loftq):
            return None
        from lorax.quant import QuantSpec

        c = self.trained
        if not c:
            # An adapter without its run: its own notes say what its factors fit.
            assert self.adapter is not None
            format, block, *double = str(_fitted(self.adapter)[1] or "nf4/64/double").split("/")
            return QuantSpec(format, bool(double), int(block))
        try:
            return QuantSpec(c["quant"], c["double_quant"], c["quant_block"])
        except KeyError as error:
            raise LoraxError(f"{self.adapter}: its run.json lacks {error}; it is damaged") from None


def find(base: str | None, adapter: str | None) -> Source:
    """Settle which base and which adapter are meant.

    `adapter` may be an adapter's folder or a run's folder. A run that trained whole weights has no adapter:
    its `model/` is then the base. Without `base`, the one that the run or the adapter names is taken.

    Raises:
        LoraxError: the folder holds nothing of the kind.
    """
    if adapter is None:
        return Source(DEFAULT_BASE if base is None else base, None)
    folder = Path(adapter)
    if not adapter or not folder.is_dir():
        raise LoraxError(f"{folder}: no such folder (--adapter takes a run's folder or an adapter's)")
    if (folder / "adapter_config.json").is_file():
        return _over(base, folder, folder.parent)
    if (folder / "adapter" / "adapter_config.json").is_file():
        return _over(base, folder / "adapter", folder)
    if (folder / "model" / "config.json").is_file():
        return Source(str(folder / "model"), None)
    raise LoraxError(f"{folder}: holds neither adapter_config.json nor a finished run")


def _over(base: str | None, adapter: Path, run: Path) -> Source:
    """An adapter and its base: the quantised one that a LoftQ run wrote beside it, or one by name."""
    settings = settings_of(run / "run.json")
    turns, _ = _fitted(adapter)
    if turns > 1:
        own = run / "base" if settings else Path(_named_by(adapter / "adapter_config.json"))
        if base is not None and Path(base).resolve() != own.resolve():
            raise LoraxError(
                f"{adapter}: LoftQ fitted it to the quantised base in {own}, and to no other; leave --base out"
            )
        return Source(str(own), adapter, settings, loftq=True, own=True)
    name = base if base is not None else settings.get("base") or _named_by(adapter / "adapter_config.json")
    return Source(name, adapter, settings, loftq=turns > 0)


def _fitted(adapter: Path) -> tuple[int, str | None]:
    """LoftQ's turns, and how the base was quantised, by the adapter's own notes; (0, None) for one of PEFT's."""
    from lorax.io import peft_meta  # as late as the weights: `lorax merge --help` needs none of it

    file = adapter / peft_meta.FILE
    if not file.is_file():
        return 0, None
    notes = peft_meta.read(file)
    return notes.loftq, notes.quantised


def settings_of(record: Path) -> dict[str, Any]:
    """What a run's record says; nothing where there is none."""
    try:
        config = json.loads(record.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def open_model(source: Source, packed: bool = True) -> tuple[Any, Any]:
    """Load a source: the model, and its parameters with the adapter over them if there is one.

    packed: load the base as the run had it, in few bits if it was so; else as the file has it.
    """
    from lorax import load_adapter
    from lorax.models import load

    model = load(source.base, source.dtype, quantize=source.spec() if packed else None)
    if source.adapter is None:
        return model, model.params
    model = _with_head(model, source.adapter)
    return model, load_adapter(source.adapter, model.params)


def _with_head(model: Any, adapter: Path) -> Any:
    """The model with the head that an adapter was trained with, where that is one over labels."""
    from lorax.io import peft_meta

    notes = peft_meta.read(adapter / peft_meta.FILE) if (adapter / peft_meta.FILE).is_file() else None
    if notes is None or not notes.labels or model.config.labels:
        return model
    import jax

    from lorax.models import with_labels

    # Drawn and then replaced: the adapter brings the head's values.
    return with_labels(model, notes.labels, jax.random.key(0), regression=notes.regression)


def _named_by(config: Path) -> str:
    """The base that an adapter's own configuration names, else the default."""
    try:
        value = json.loads(config.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_BASE
    return value if isinstance(value, str) and value else DEFAULT_BASE
