"""The loss curve of a run, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def plot_loss(path: Path, rows: list[dict[str, Any]], evals: list[dict[str, Any]], title: str) -> None:
    """Draw training loss over steps (thin), its moving mean (thick) and the evaluations (dots).

    Args:
        path: the PNG to write.
        rows: the rows of `metrics.jsonl`: `step` and `loss` (nats per completion token).
        evals: evaluations with `step` and `loss`.
        title: what the run was.
    """
    # matplotlib takes a second to import, and pyplot would look for a display: draw on a bare Agg canvas.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows])
    width = max(1, len(rows) // 20)
    axes.plot(steps, loss, color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
    if len(rows) >= 2 * width > 2:
        mean = np.convolve(loss, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color="tab:blue", linewidth=1.8, label=f"mean of {width} steps")
    if evals:
        axes.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per completion token", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend()
    aside = path.with_suffix(".writing.png")
    figure.savefig(aside)
    aside.replace(path)
