"""How the grouped product is cut into tiles of rows on a TPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lorax_kernels.multi_lora.windows import FIELDS, UNIT, UNITS, WINDOW, most_windows

MIB = 1 << 20
# Of the 128 MiB (v5e, v6e) or 64 MiB (v5p, tpu7x) of a core; the compiler's own scratch needs the rest.
VMEM = {"v5e": 112 * MIB, "v6e": 112 * MIB, "v5p": 54 * MIB, "tpu7x": 54 * MIB}
SPARE = 8 * MIB
# Numbers of the windows lie in a scalar memory of 1 MiB.
_SMEM = MIB // 2
# Rows of a tile. As many keep a matrix unit busy while the next weights arrive.
_TALLEST = 256
# Groups of fewer rows are no tiles, and a batch of many tiles is put in order of its adapters first.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Plan:
    """Tiles of `size` rows, after sorting if `sorts`. slots: how many windows of a factor have room, 2 to fetch ahead.

    rows: of a group once it is sorted.
    """

    size: int
    tiles: int
    sorts: bool
    rows: int
    slots: int
    most: int

    def smem(self) -> int:
        """Bytes of scalars."""
        return 4 * (3 * UNITS * self.tiles * self.most + len(FIELDS) * (self.tiles + 1))


def stripe(dtype: Any) -> int:
    """Rows of a tile of memory."""
    return 32 // jnp.dtype(dtype).itemsize


def vmem(size: int, slots: int, k: int, n: int, dtype: Any, out: Any, factors: Any) -> int:
    """Bytes of VMEM: tiles of x, y and the result, two of each; what arrives of the factors, and both as used."""
    wide = lambda width: -(-width // WINDOW) * WINDOW  # noqa: E731
    x, y, f = (jnp.dtype(z).itemsize for z in (dtype, out, factors))
    height = -(-size // 16) * 16
    blocks = 2 * height * (wide(k) * x + 2 * wide(n) * y)
    arriving = slots * UNITS * (UNIT + stripe(factors)) * f
    return blocks + (wide(k) + wide(n)) * (arriving + WINDOW * x) + 4 * height * wide(n)


def plan(
    groups: int, rows: int, k: int, n: int, max_rank: int, dtype: Any, out: Any, factors: Any, chip: str
) -> Plan | None:
    """The tallest tiles that fit; None if none do.

    Args:
        groups, rows, k, n: x (groups, rows, k) and a result of n columns.
        max_rank: a bound on the ranks.
        dtype, out, factors: of x, of the result and of the factors.
        chip: `"v5e"`, `"v5p"`, `"v6e"` or `"tpu7x"`.
    """
    m = groups * rows
    for size in dict.fromkeys((min(m, _TALLEST), 128, 64, 32, 16)):
        # Whole groups in a tile, where they make whole tiles of memory: the fewer adapters a tile may have.
        if FEWEST_ROWS <= rows < size < m and size // rows * rows % 16 == 0:
            size = size // rows * rows
        for slots in (2, 1):
            if size > m or vmem(size, slots, k, n, dtype, out, factors) > VMEM[chip]:
                continue
            sorts = rows < FEWEST_ROWS and m > size
            each, count = (1, m) if sorts else (rows, groups)
            found = Plan(size, -(-m // size), sorts, each, slots, most_windows(count, each, size, max_rank))
            if found.smem() <= _SMEM:
                return found
    return None


@dataclass(frozen=True)
class GradPlan:
    """The gradient of a factor: blocks of `size` rows, `parts` of them a group, and room for `rank` ranks."""

    size: int
    parts: int
    rank: int


def grad_plan(rows: int, k: int, n: int, max_rank: int, dtype: Any, factors: Any, chip: str) -> GradPlan | None:
    """Blocks of a group's rows for x (groups, rows, k) and dy (groups, rows, n); None if none fit."""
    wide = lambda width: -(-width // WINDOW) * WINDOW  # noqa: E731
    x, f = jnp.dtype(dtype).itemsize, jnp.dtype(factors).itemsize
    rank = -(-max_rank // UNIT) * UNIT
    fixed = wide(n) * (2 * (rank + stripe(factors)) * f + rank * x) + wide(k) * 4 * (2 * rank + 24)
    for size in dict.fromkeys((min(rows, _TALLEST), 128, 64, 32, 16)):
        if size <= rows and fixed + 2 * (-(-size // 16) * 16) * (wide(k) + wide(n)) * x <= VMEM[chip]:
            return GradPlan(size, -(-rows // size), rank)
    return None
