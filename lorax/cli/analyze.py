"""`lorax analyze`: what happened to the weights?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lorax.cli.output import print_json, print_table
from lorax.cli.source import find, open_model
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Compare two models weight by weight: a base and an adapter, two adapters of one base, or two models.

    Example: lorax analyze smollm2-135m runs/medical-lora
    """

    a: tyro.conf.Positional[str]
    """The first: a base (directory, .gguf file, hf:org/name, smollm2-135m), a run's folder or an adapter's."""
    b: tyro.conf.Positional[str]
    """The second, likewise."""
    out: str = "analysis"
    """The folder for analysis.json and the pictures; it must not exist."""
    intruders: bool = False
    """Look for intruder dimensions too: a full SVD of every matrix that changed."""
    json: bool = False
    """Print the whole analysis as one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        out = Path(self.out)
        if out.exists():
            raise LoraxError(f"{out}: exists already; choose another --out")
        before, after = self._load()
        from lorax.analysis import analyze, intruders
        from lorax.analysis.pictures import draw
        from lorax.io.atomic import replace_dir, write_json

        found = analyze(before, after)
        if self.intruders:
            plain = None if found.first else before
            found = dataclasses.replace(found, intruding=intruders(plain, after))
        data = {"a": self.a, "b": self.b, **found.as_dict()}
        with replace_dir(out) as new:
            write_json(new / "analysis.json", data)
            draw(new, found, f"{Path(self.a).name} and {Path(self.b).name}")
        if self.json:
            print_json(data)
            return
        columns, lines = found.table()
        print_table(columns, lines, f"{self.a} and {self.b}: means over the matrices that changed")
        if found.unchanged:
            print(f"unchanged: {', '.join(found.unchanged)}")
        print(f"saved in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")

    def _load(self) -> tuple[Any, Any]:
        """Both trees. Adapters stand over one base, loaded once."""
        sources = [find(None, name) if _is_run(name) else find(name, None) for name in (self.a, self.b)]
        first, second = sources
        if first.adapter is None and second.adapter is not None:
            second = second._replace(base=first.base)
        elif first.adapter is not None and second.adapter is not None:
            first = first._replace(base=second.base)
        model, before = open_model(first)
        if second.adapter is not None and second.base == first.base and second.spec() == first.spec():
            from lorax import load_adapter

            return before, load_adapter(second.adapter, model.params)
        return before, open_model(second)[1]


def _is_run(name: str) -> bool:
    folder = Path(name)
    homes = (folder / "adapter_config.json", folder / "adapter" / "adapter_config.json", folder / "run.json")
    return any(home.is_file() for home in homes)
