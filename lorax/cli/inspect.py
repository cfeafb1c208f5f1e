"""`lorax inspect`: what is in this folder or file?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lorax.cli.output import print_json, print_table
from lorax.cli.source import find, open_model
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Say what an adapter changes, or what a base model is made of.

    Example: lorax inspect runs/medical-lora
    """

    path: tyro.conf.Positional[str]
    """A run's folder, an adapter's folder, or a base (directory, .gguf file, hf:org/name, smollm2-135m)."""
    base: str | None = None
    """The base of an adapter; by default the one that it was trained on."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        from lorax import report

        if not self.path:
            raise LoraxError("the path is empty; name a run's folder, an adapter's, or a base")
        source = find(self.base, self.path) if _is_adapter(Path(self.path)) else find(self.path, None)
        model, params = open_model(source)
        about = report(params)
        weights = [
            {"path": row.path, "shape": list(row.shape), "dtype": row.dtype, "parameters": row.frozen}
            for row in report(model.params).rows
        ]
        if self.json:
            print_json(
                {
                    "base": source.base,
                    "adapter": str(source.adapter) if source.adapter else None,
                    "config": dataclasses.asdict(model.config),
                    "parameters": sum(w["parameters"] for w in weights),
                    "weights": weights,
                    "report": about.as_dict(),
                }
            )
            return
        total = sum(w["parameters"] for w in weights)
        title = f"{source.base}: {model.config.family}, {total:,} parameters"
        rows = [(w["path"], "x".join(map(str, w["shape"])), w["dtype"], f"{w['parameters']:,}") for w in weights]
        print_table(("weight", "shape", "dtype", "parameters"), rows, title)
        if source.adapter is not None:
            print(about)


def _is_adapter(path: Path) -> bool:
    homes = (path / "adapter_config.json", path / "adapter" / "adapter_config.json", path / "run.json")
    return any(home.is_file() for home in homes)
