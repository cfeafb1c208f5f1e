"""How a product with a 4-bit weight is cut into blocks on a TPU, and the bytes that this moves.

y [M, F] = x [M, C] W, where C is the contracted axis (K of W for x @ W, N for dy @ W^T) and F the other one. The grid
is (rows / chunk, C / bc, F / bf, chunk / bm), the last one fastest:

- x enters VMEM once for each (chunk, bc) part and stays for all of F;
- a block of W is read and dequantised once for each chunk of rows;
- y is written once; partial sums over C stay in VMEM in float32.

With one chunk every byte moves once. More chunks are taken only where VMEM is too small.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorax_kernels.nf4_matmul.layout_tpu import GROUP_ROWS, LANES, padded

MIB = 1 << 20
# Of the 128 MiB (v5e, v6e) or 64 MiB (v5p, tpu7x) of a core; the compiler's own scratch needs the rest.
VMEM = {"v5e": 112 * MIB, "v6e": 112 * MIB, "v5p": 54 * MIB, "tpu7x": 54 * MIB}
# In VMEM, x arrives in tiles of 8 bf16 rows, and the product of these takes tiles of 16: pairs are made once, or every
# product would put tiles together again and spill them.
_HALF_TILES = ("v5e", "v5p")
# A product over more of C in one step is a very long program; over less, partial sums cost as much as the product.
_LONGEST = 9728
_BEST = 4096
# Columns of y in one step, at most.
_WIDEST = 1024


@dataclass(frozen=True)
class Plan:
    """Blocks of one product. rows, contracted, free: the padded M, C and F; the others: see above."""

    transposed: bool
    rows: int
    contracted: int
    free: int
    chunk: int
    bc: int
    bf: int
    bm: int
    rank: int
    itemsize: int
    paired: bool = False

    @property
    def grid(self) -> tuple[int, int, int, int]:
        return self.rows // self.chunk, self.contracted // self.bc, self.free // self.bf, self.chunk // self.bm

    @property
    def w_block(self) -> tuple[int, int]:
        """Rows and columns of W in a step."""
        return (self.bf, self.bc) if self.transposed else (self.bc, self.bf)

    @property
    def held(self) -> int:
        """Blocks of x that arrive together: a part of C for the chunk, or one where `pairs` holds the part."""
        return 1 if self.paired else self.chunk // self.bm

    @property
    def slots(self) -> int:
        """How many times `held` blocks have room: two, so that the next ones arrive meanwhile, if there are more."""
        return 1 if self.rows * self.contracted == self.held * self.bm * self.bc else 2

    def vmem(self) -> int:
        """Bytes of VMEM: buffers, two for what is fetched ahead, and the float32 block of the product."""
        _, steps, _, _ = self.grid
        weights = self.bc * self.bf
        x = self.slots * self.held * self.bm + (self.chunk if self.paired else 0)
        total = x * self.bc * self.itemsize + weights * self.itemsize
        total += 2 * (weights // 2 + weights // 16) + self.bm * self.bf * (2 * self.itemsize + 8)
        if steps > 1:
            total += 4 * self.chunk * self.free
        if self.rank:
            lanes = -(-self.rank // LANES) * LANES
            total += 4 * lanes * (self.chunk + 2 * self.bm) + 2 * lanes * self.itemsize * (self.bc + self.bf)
        return total

    def moved(self) -> dict[str, int]:
        """Bytes between HBM and VMEM by operand, from the index maps: a block is fetched when its index moves."""
        chunks, steps, blocks, _ = self.grid
        # W's block changes at every step of its two axes; only a single one stays from chunk to chunk.
        fetches = chunks if steps * blocks > 1 else 1
        w_rows, w_columns = (self.free, self.contracted) if self.transposed else (self.contracted, self.free)
        groups = -(-w_rows // GROUP_ROWS) if steps == 1 or self.transposed else w_rows // GROUP_ROWS
        moved = {
            "codes": fetches * w_rows * w_columns // 2,
            "scales": fetches * groups * 8 * w_columns * 4,
            "x": self.rows * self.contracted * self.itemsize,
            "y": self.rows * self.free * self.itemsize,
        }
        if self.rank:
            moved["a"] = (chunks if steps > 1 else 1) * self.contracted * self.rank * self.itemsize
            moved["b"] = (chunks if blocks > 1 else 1) * self.free * self.rank * self.itemsize
            moved["h"] = 4 * self.rows * self.rank
        return moved


def least_bytes(m: int, k: int, n: int, itemsize: int, rank: int = 0) -> int:
    """Every operand once, nothing padded: codes, float32 scales, x, y and the low-rank term's."""
    return k * n // 2 + k * n // 16 + (m * (k + n) + rank * (k + n)) * itemsize + 4 * m * rank


def plan(transposed: bool, m: int, k: int, n: int, itemsize: int, rank: int, chip: str) -> Plan | None:
    """The plan that moves fewest bytes among those that fit VMEM; None if none does."""
    bm = 256 if m > 256 else -(-m // 16) * 16
    rows = -(-m // bm) * bm
    paired = chip in _HALF_TILES and itemsize == 2
    free_most = _WIDEST if m > 32 else 512
    fits = [
        candidate
        for contracted, bc in _contracted(transposed, k, n)
        for free, bf in _free(transposed, k, n, free_most)
        for chunk in _chunks(rows, bm)
        if (candidate := Plan(transposed, rows, contracted, free, chunk, bc, bf, bm, rank, itemsize, paired)).vmem()
        <= VMEM[chip]
    ]
    least = least_bytes(m, k, n, itemsize, rank)
    # A percent of bytes is not worth a worse block.
    cost = lambda p: (round(50 * sum(p.moved().values()) / least), _distance(p.bc), -p.bf, -p.chunk)  # noqa: E731
    return min(fits, key=cost, default=None)


def _contracted(transposed: bool, k: int, n: int) -> list[tuple[int, int]]:
    """Candidates (padded C, block of C)."""
    kp, np_ = padded(k, n)
    whole = np_ if transposed else -(-k // LANES) * LANES
    found = [(whole, whole)] if whole <= _LONGEST else []
    size, unit = (np_, LANES) if transposed else (kp, GROUP_ROWS)
    found += [(size, bc) for bc in _divisors(size, unit) if bc < size and bc <= _LONGEST]
    return found


def _free(transposed: bool, k: int, n: int, most: int) -> list[tuple[int, int]]:
    """Candidates (padded F, block of F)."""
    kp, np_ = padded(k, n)
    if not transposed:
        return [(np_, bf) for bf in _divisors(np_, LANES) if bf <= most]
    whole = -(-k // LANES) * LANES
    found = [(whole, whole)] if whole <= _WIDEST else []
    return found + [(kp, bf) for bf in _divisors(kp, GROUP_ROWS) if bf <= max(most, GROUP_ROWS)]


def _chunks(rows: int, bm: int) -> list[int]:
    return [bm * d for d in range(1, rows // bm + 1) if (rows // bm) % d == 0]


def _divisors(size: int, unit: int) -> list[int]:
    return [unit * d for d in range(1, size // unit + 1) if (size // unit) % d == 0]


def _distance(bc: int) -> float:
    return bc / _BEST - 1 if bc >= _BEST else 4 * (_BEST / bc - 1)
