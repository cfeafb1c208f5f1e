"""Where one plain implementation of `multi_lora` overtakes another on the machine that is here: what the table's bounds
come from.

    python -m lorax_kernels.measure_multi [OUT.json] [--rounds 5]

Two series. `ranks`: groups of 64 rows, and of one, over banks of growing total rank (where do two products over all
ranks lose to a loop over those asked for?). `rows`: a bank of 32 mixed adapters, by how many groups there are and how
many rows each has (where does sorting rows into tiles pay?).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels import matrix, measure
from lorax_kernels.multi_lora.cases import MIXED, Case

WIDTH = 576
TOTALS = (16, 32, 64, 128, 256)
SHAPES = [(32, 1), (128, 1), (256, 1), (512, 1), (2048, 1), (128, 2), (256, 2), (64, 4), (256, 4), (512, 4), (256, 8)]
SHAPES += [(64, 16)]


def series() -> Iterator[tuple[str, Case]]:
    """The name of a series, and a case of it."""
    for total in TOTALS:
        for groups, rows in ((32, 1), (32, 8), (32, 64)):
            yield "ranks", Case(f"total {total}", groups, rows, WIDTH, WIDTH, (16,) * (total // 16))
    for groups, rows in SHAPES:
        yield "rows", Case(f"{groups} x {rows}", groups, rows, WIDTH, WIDTH, tuple(MIXED[i % 5] for i in range(32)))


def main(words: list[str] | None = None) -> None:
    """Measure, print a line for each case, and write all of it."""
    parser = argparse.ArgumentParser(prog="python -m lorax_kernels.measure_multi", description=__doc__)
    parser.add_argument("out", nargs="?", default="measured_multi.json")
    parser.add_argument("--rounds", type=int, default=5, help="times that each implementation takes its turn")
    given = parser.parse_args(words)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rows: list[dict[str, Any]] = []
    for name, case in series():
        for op in ("multi_lora", "multi_lora_grad"):
            seconds = measure.times(matrix.multi_programs(op, case, dtype), given.rounds, 5)
            row = {"series": name, "op": op, "groups": case.groups, "rows": case.rows, "total": sum(case.ranks)}
            micro = {which: round(1e6 * value, 1) for which, value in seconds.items()}
            rows.append({**row, "fastest": min(micro, key=micro.__getitem__), "microseconds": micro})
            print(*rows[-1].values(), flush=True)
    about = {"command": "python -m lorax_kernels.measure_multi", "device": jax.devices()[0].device_kind}
    about |= {"dtype": jnp.dtype(dtype).name, "width": WIDTH, "jax": jax.__version__}
    Path(given.out).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
