"""What an analysis found, as pictures: layer x kind, spectra, similarity, what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax.analysis.forgetting import Forgotten
from lorax.analysis.result import Analysis


def draw(folder: Path, found: Analysis, title: str) -> list[str]:
    """Write the pictures that there is something to draw for.

    Args:
        folder: must be there.
        found: the analysis.
        title: what was analysed.

    Returns:
        The names of the files.
    """
    written = []
    if any(row.changed and row.layer is not None for row in found.rows):
        _save(folder / "change.png", heat_map(found, title))
        written.append("change.png")
    if any(row.changed for row in found.rows):
        _save(folder / "spectra.png", spectra(found, title))
        written.append("spectra.png")
    if found.similar:
        _save(folder / "similarity.png", similarity_map(found, title))
        written.append("similarity.png")
    return written


def heat_map(found: Analysis, title: str) -> Any:
    """||dW|| / ||W|| by layer and kind, on a logarithmic scale; grey where nothing changed."""
    from matplotlib.colors import LogNorm

    kinds, grid = found.grid()
    figure, axes = _figure(1.2 + 0.75 * len(kinds), 1.8 + 0.18 * len(grid))
    shown = np.where(np.isfinite(grid) & (grid > 0), grid, np.nan)
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    axes.set_facecolor("0.85")
    image = axes.imshow(shown, aspect="auto", origin="lower", norm=LogNorm(low, high if high > low else low * 1.01))
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set(ylabel="layer", title=f"{title}: relative change")
    figure.colorbar(image, ax=axes, label="||dW|| / ||W||")
    return figure


def spectra(found: Analysis, title: str) -> Any:
    """Singular values of the changes over the largest: a line for each kind, the mean of its layers."""
    figure, axes = _figure(7, 4.5)
    groups: dict[str, list[np.ndarray]] = {}
    for row in found.rows:
        if row.changed:
            groups.setdefault(row.kind, []).append(np.asarray(row.values) / row.values[0])
    for kind, lines in groups.items():
        mean = np.mean(lines, axis=0)
        axes.semilogy(np.arange(1, len(mean) + 1), np.maximum(mean, 1e-8), label=kind, linewidth=1.4)
    axes.set(xlabel="singular value", ylabel="over the largest", title=f"{title}: spectra of the changes")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    return figure


def similarity_map(found: Analysis, title: str) -> Any:
    """phi(A, B, i, j), the mean of all matrices that are as large as most."""
    shapes = [one.grid.shape for one in found.similar]
    usual = max(set(shapes), key=shapes.count)
    mean = np.mean([one.grid for one in found.similar if one.grid.shape == usual], axis=0)
    figure, axes = _figure(5.2, 4.5)
    image = axes.imshow(mean, origin="lower", vmin=0, vmax=1, extent=(0.5, usual[1] + 0.5, 0.5, usual[0] + 0.5))
    axes.set(xlabel="j, directions of the second", ylabel="i, directions of the first", title=f"{title}: phi(i, j)")
    figure.colorbar(image, ax=axes)
    return figure


def forgetting_bars(rows: Sequence[Forgotten], title: str) -> Any:
    """Loss before and after on each set, side by side."""
    figure, axes = _figure(2 + 1.2 * len(rows), 4)
    at = np.arange(len(rows))
    axes.bar(at - 0.2, [row.before for row in rows], 0.4, label="before", color="0.7")
    axes.bar(at + 0.2, [row.after for row in rows], 0.4, label="after")
    for x, row in zip(at, rows, strict=True):
        axes.text(x, max(row.before, row.after), f"{row.change:+.3f}", ha="center", va="bottom", fontsize="small")
    axes.set_xticks(at, [f"{row.name}\n(trained for)" if row.own else row.name for row in rows])
    axes.set(ylabel="loss, nats per token", title=f"{title}: learnt and forgotten")
    axes.legend(fontsize="small")
    return figure


def save_forgetting(path: Path, rows: Sequence[Forgotten], title: str) -> None:
    """Write `forgetting_bars` as a picture."""
    _save(path, forgetting_bars(rows, title))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # pyplot would look for a display; a bare canvas needs none.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(path: Path, figure: Any) -> None:
    figure.savefig(path)
