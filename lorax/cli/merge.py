"""`lorax merge`: base + adapter as one model that any Hugging Face reader loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax.cli.output import print_json
from lorax.cli.source import find, open_model
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Add an adapter to its base for good and write a Hugging Face safetensors directory.

    Example: lorax merge --adapter runs/medical-lora --out merged
    """

    adapter: str
    """A run's folder or an adapter's."""
    out: str
    """The directory to write; it must not exist."""
    base: str | None = None
    """The base model; by default the one that the adapter was trained on."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        out = Path(self.out)
        if out.exists():
            raise LoraxError(f"{out}: exists already; choose another --out")
        source = find(self.base, self.adapter)
        if source.adapter is None:
            raise LoraxError(f"{self.adapter}: that run trained whole weights; {source.base} is already one model")
        from lorax import merge
        from lorax.models import save_hf

        model, params = open_model(source)
        save_hf(out, model, merge(params))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        if self.json:
            print_json({"out": str(out), "base": source.base, "adapter": str(source.adapter), "bytes": size})
        else:
            print(f"{source.base} + {source.adapter} -> {out} ({size / 1e6:,.1f} MB)")
