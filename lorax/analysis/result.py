"""What an analysis found, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lorax.analysis.changes import Change
    from lorax.analysis.intruders import Intruders
    from lorax.analysis.similarity import Similarity


@dataclass(frozen=True)
class Analysis:
    """The changes of all matrices; prints as a table by kind.

    rows: of the second tree against the base or the first tree.
    first: of the first adapter, where two were compared.
    similar: phi of the two, matrix by matrix.
    intruding: intruder dimensions, where they were looked for.
    """

    rows: tuple[Change, ...]
    first: tuple[Change, ...] = ()
    similar: tuple[Similarity, ...] = ()
    intruding: tuple[Intruders, ...] = ()

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Paths of the weights of which nothing changed."""
        changed = {row.path for row in self.rows if row.changed}
        return tuple(dict.fromkeys(row.path for row in self.rows if row.path not in changed))

    def by_kind(self) -> dict[str, dict[str, float]]:
        """kind -> means over its matrices that changed, and their joint relative size."""
        return _grouped(self.rows, lambda row: row.kind)

    def by_layer(self) -> dict[int, dict[str, float]]:
        """Layer -> the same over the layer's matrices."""
        return _grouped([row for row in self.rows if row.layer is not None], lambda row: row.layer)

    def grid(self, figure: str = "relative_frobenius") -> tuple[list[str], np.ndarray]:
        """Kinds, and a figure as (layers, kinds); NaN where a kind has no such layer."""
        rows = [row for row in self.rows if row.layer is not None]
        kinds = list(dict.fromkeys(row.kind for row in rows))
        out = np.full((1 + max((row.layer or 0 for row in rows), default=-1), len(kinds)), np.nan)
        for row in rows:
            value = getattr(row, figure)
            out[row.layer, kinds.index(row.kind)] = math.nan if value is None else value
        return kinds, out

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is null."""
        return _plain(
            {
                "weights": [dataclasses.asdict(row) | {"kind": row.kind} for row in self.rows],
                "first": [dataclasses.asdict(row) | {"kind": row.kind} for row in self.first],
                "unchanged": list(self.unchanged),
                "by_kind": self.by_kind(),
                "by_layer": {str(layer): value for layer, value in self.by_layer().items()},
                "similarity": [
                    {"path": one.path, "layer": one.layer, "phi": one.whole, "grid": one.grid.tolist()}
                    for one in self.similar
                ],
                "intruders": [dataclasses.asdict(one) for one in self.intruding],
            }
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns, and a row for each kind."""
        alike, strangers = _means(self.similar, lambda one: one.whole), _means(self.intruding, lambda x: len(x.ranks))
        energy = _means(self.intruding, lambda one: one.energy)
        columns = ["weights", "matrices", "|dW|/|W|", "s1(dW)/s1(W)", "effective rank", "amplification"]
        columns += ["phi"] if self.similar else []
        columns += ["intruders", "their energy"] if self.intruding else []
        lines = []
        for kind, means in self.by_kind().items():
            line = [kind, f"{means['changed']:.0f} of {means['matrices']:.0f}", f"{means['relative_frobenius']:.3g}"]
            line += [f"{means[name]:.3g}" for name in ("relative_spectral", "effective_rank", "amplification")]
            line += [_cell(alike, kind)] if self.similar else []
            line += [_cell(strangers, kind), _cell(energy, kind)] if self.intruding else []
            lines.append(tuple(line))
        return tuple(columns), lines

    def __str__(self) -> str:
        columns, lines = self.table()
        widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [columns, *lines]
        )


def kind_of(path: str) -> str:
    """A weight's kind: its path without the words that all weights share.

    Example:
        >>> kind_of("layers/attn/q_proj/kernel")
        'attn/q_proj'
    """
    words = [word for word in path.split("/") if word not in ("params", "layers", "kernel", "embedding")]
    return "/".join(words) or path


def _grouped(rows: Iterable[Change], key: Callable[[Change], Any]) -> dict[Any, dict[str, float]]:
    groups: dict[Any, list[Change]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return {name: _summary(group) for name, group in groups.items()}


def _summary(group: list[Change]) -> dict[str, float]:
    changed = [row for row in group if row.changed]

    def mean(name: str) -> float:
        values = [getattr(row, name) for row in changed]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return float(np.mean(finite)) if finite else 0.0

    names = ("relative_frobenius", "relative_spectral", "effective_rank", "amplification", "frobenius", "spectral")
    return {"matrices": len(group), "changed": len(changed), **{name: mean(name) for name in names}}


def _means(found: Iterable[Any], value: Callable[[Any], float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for one in found:
        groups[kind_of(one.path)].append(value(one))
    return {kind: float(np.mean(values)) for kind, values in groups.items()}


def _cell(values: dict[str, float], kind: str) -> str:
    return f"{values[kind]:.3g}" if kind in values else "-"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
