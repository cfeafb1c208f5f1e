"""How a product with a 4-bit weight is cut into tiles on an NVIDIA GPU, and the bytes that this moves."""

from __future__ import annotations

from dataclasses import dataclass

DECODE_ROWS = 32
_BLOCKS_WANTED = 128  # streaming multiprocessors of the larger chips


@dataclass(frozen=True)
class Plan:
    """Tiles of one launch.

    rows, free, contracted: y [M, F] = x [M, C] W; for dy @ W^T the free axis is K of W.
    rank: of the low-rank term, padded to what a tensor core takes; 0 without one.
    split: programs that share a tile of y, each with its part of C.
    """

    transposed: bool
    rows: int
    free: int
    contracted: int
    rank: int
    split: int
    block_rows: int
    block_free: int
    block_contracted: int
    warps: int
    stages: int
    itemsize: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.rows // self.block_rows), -(-self.free // self.block_free), self.split)

    def moved(self, rank: int) -> dict[str, int]:
        """Bytes that must cross from device memory when each tile of x that one column of programs reads stays in L2.

        Programs follow each other along the rows first, so codes and scales of a column of y are read once and found
        in the cache by the programs beside it; x is read once for as long as it fits the cache, as it does here.
        """
        weights = self.free * self.contracted
        out = {
            "codes": weights // 2,
            "scales": weights // 16,
            "x": self.rows * self.contracted * self.itemsize,
            "y": self.rows * self.free * self.itemsize,
        }
        if self.split > 1:
            out["partial sums"] = 2 * self.split * self.rows * self.free * 4
        if rank:
            out["a, b, h"] = rank * ((self.free + self.contracted) * self.itemsize + 4 * self.rows)
        return out


def plan(transposed: bool, m: int, k: int, n: int, itemsize: int, rank: int, capability: int = 90) -> Plan:
    """Tiles for x @ W, or dy @ W^T, by the number of rows.

    capability: 80 for sm_80. Sums are held in registers before sm_100, which with a low-rank term leaves room for half
    as many rows of a tile.
    """
    free, contracted = (k, n) if transposed else (n, k)
    padded_rank = 0 if not rank else max(16, 1 << (rank - 1).bit_length())
    if m <= DECODE_ROWS:
        rows = 16 if m <= 16 else 32
        tiles = -(-free // 64)
        # Few columns leave most of the chip idle; a part of C for each program fills it. Partial sums cost bytes, so
        # never more than is needed, or than a tenth of all bytes.
        most = max(1, contracted // 512)
        spare = least_bytes(m, k, n, itemsize, rank) // 10
        split = max(1, min(4, most, _BLOCKS_WANTED // (2 * tiles), spare // (8 * m * free)))
        # Steps that divide C need no mask: whole blocks of 64 do, twice as many where they fit.
        depth = 64 if itemsize == 4 or contracted % 128 else 128
        return Plan(transposed, m, free, contracted, padded_rank, split, rows, 64, depth, 4, 3, itemsize)
    wide = itemsize == 4
    height = 64 if wide or (rank and capability < 100) else 128
    if contracted * itemsize % 16:
        # Rows of x that begin at odd places are loaded number by number, each with an address of its own in registers.
        height = 64 if capability >= 90 else 32
    depth = 32 if wide and transposed else 64
    return Plan(transposed, m, free, contracted, padded_rank, 1, height, 128, depth, 8, 2, itemsize)


def least_bytes(m: int, k: int, n: int, itemsize: int, rank: int = 0) -> int:
    """Every operand once: codes, float32 scales, x, y and the low-rank term's."""
    return k * n // 2 + k * n // 16 + (m * (k + n) + rank * (k + n)) * itemsize + 4 * m * rank
