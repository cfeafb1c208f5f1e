"""How commands print: a table for people, one JSON object for machines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on standard output; the first column is text, the others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def measures(labels: bool = False, numbers: bool = False, pairs: bool = False) -> tuple[str, str, str]:
    """The columns of `figures`, by what is evaluated."""
    if numbers:
        return "", "-", "mean squared error"
    return "", "preferred" if pairs else "right label" if labels else "exact match", "loss"


def figures(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """Accuracy and loss as people read them; a dash for what is not known."""
    accuracy, loss = evaluation.get("accuracy"), evaluation.get("loss")
    return ("-" if accuracy is None else f"{100 * accuracy:.1f}%", "-" if loss is None else f"{loss:.3f}")


@contextlib.contextmanager
def output_is_ours() -> Iterator[None]:
    """Inside, what native code prints goes to standard error: the CPU's collectives tell who they have met."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)
