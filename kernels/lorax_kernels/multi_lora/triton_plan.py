"""How the grouped product is cut into tiles on an NVIDIA GPU, and the bytes that this moves."""

from __future__ import annotations

from dataclasses import dataclass

DECODE_ROWS = 256
_PROGRAMS = 132  # the streaming multiprocessors of the larger chips
_LARGEST_BLOCK = 64
# Columns of a program's result. Addresses of an atomic sum take registers, so there are fewer of those.
COLUMNS = {"expand": 128, "grad": 64}
# Partial sums of a product are worth their bytes where each part is at least this long.
_SHORTEST_PART = 512
_MOST_PARTS = 8


@dataclass(frozen=True)
class Plan:
    """Tiles of the launches of one operation.

    rows, contracted, free: x (rows, contracted) meets the first factor, and the result is (.., free).
    rank: the bound on the ranks, padded to whole blocks; block_rank: ranks of a block.
    block_rows: of a tile; tiles: a bound on their number.
    split: programs that share a tile's product with the first factor.
    """

    rows: int
    contracted: int
    free: int
    rank: int
    tiles: int
    block_rows: int
    block_rank: int
    block_contracted: int
    split: int
    itemsize: int

    @property
    def blocks(self) -> int:
        """Blocks of ranks."""
        return self.rank // self.block_rank

    @property
    def grids(self) -> dict[str, tuple[int, int, int]]:
        """Programs of each launch. Along the first axis each takes its share of the tiles."""
        programs = min(self.tiles, 2 * _PROGRAMS)
        return {
            "shrink": (programs, self.blocks, self.split),
            "expand": (programs, -(-self.free // COLUMNS["expand"]), 1),
            "grad": (programs, -(-self.free // COLUMNS["grad"]), self.blocks),
        }


def plan(groups: int, rows: int, k: int, n: int, max_rank: int, itemsize: int) -> Plan:
    """Tiles for x (groups, rows, k), a result of n columns and adapters of at most `max_rank` ranks."""
    from lorax_kernels.multi_lora.tiles import most_tiles

    m = groups * rows
    block_rank = min(_LARGEST_BLOCK, max(16, 1 << (max_rank - 1).bit_length()))
    rank = -(-max_rank // block_rank) * block_rank
    block_rows = 16 if m <= DECODE_ROWS else 64
    tiles = most_tiles(groups, rows, block_rows)
    # Few tiles leave most of the chip idle; a part of the features for each program fills it.
    split = max(1, min(_MOST_PARTS, k // _SHORTEST_PART, _PROGRAMS // tiles))
    depth = 64 if itemsize == 4 or k % 128 else 128
    return Plan(m, k, n, rank, tiles, block_rows, block_rank, depth, split, itemsize)
