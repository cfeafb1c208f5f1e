"""Triton kernels of `multi_lora`: tiles of rows of one adapter each, found by number and never copied.

    shrink   h = w (x a^T)      a tile of rows times a block of ranks, parts of K in programs of their own
    expand   y += h b           a tile of rows times a block of columns
    grad     g += h^T x         a block of ranks of one adapter times a block of columns, over all its tiles

Factors lie as they are stored, (total, K) and (total, N), and a tile reads the rows of its adapter alone: ranks that
the adapter does not have cost no bytes. Rows beyond a tile's end repeat its last one, so that no load of x is masked.

The number of tiles is data. A launch has as many programs as can be busy at once, and each takes every GRID-th tile.

Every shape is a compile-time constant: with run-time integers the compiler cannot see that rows are aligned, and falls
back to loads of one or two bytes. Inputs come first among the arguments, outputs last, as jax-triton wants them.
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, col0, COLS: tl.constexpr, BC: tl.constexpr):
    """Columns col0.. of the rows with these numbers: (len(rows), BC), zero beyond the last column."""
    c = col0 + tl.arange(0, BC)
    at = base + rows[:, None].to(tl.int64) * COLS + c[None, :]
    if COLS % BC == 0:
        return tl.load(at)
    return tl.load(at, mask=c[None, :] < COLS, other=0.0)


@triton.jit
def shrink(
    x, factor, order, first, rows, start, rank, weight, count, h,
    T: tl.constexpr, K: tl.constexpr, M: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, GRID: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h (SPLIT, M, R) = weight * x[row] @ factor[ranks]^T at the row's place, in float32, zero where no rank is.

    x (M, K), T rows of it a group; factor (total, K); weight (groups,). Each program of the last axis has a part of K.
    """
    block, part = tl.program_id(1), tl.program_id(2)
    steps: tl.constexpr = (K + BK - 1) // BK
    each: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    i = tl.arange(0, BM)
    r = block * BR + tl.arange(0, BR)
    for tile in range(tl.program_id(0), tl.load(count), GRID):
        filled = tl.load(rows + tile)
        ranks = tl.load(rank + tile)
        if block * BR < ranks:
            place = tl.load(first + tile)
            row = tl.load(order + place + tl.minimum(i, filled - 1))
            stored = tl.load(start + tile) + tl.minimum(r, ranks - 1)
            low = tl.zeros((BM, BR), tl.float32)
            for step in range(part * each, tl.minimum(part * each + each, steps) if SPLIT > 1 else steps):
                left = load_rows(x, row, step * BK, K, BK)
                right = load_rows(factor, stored, step * BK, K, BK).to(left.dtype)
                low = tl.dot(left, tl.trans(right), low, input_precision=PRECISION)
            low = low * tl.load(weight + row // T)[:, None]
            low = tl.where(r[None, :] < ranks, low, 0.0)
            at = h + (part * M + place + i)[:, None].to(tl.int64) * R + r[None, :]
            tl.store(at, low, mask=i[:, None] < filled)


@triton.jit
def load_low(h, place, filled, block, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """A tile's h (BM, BR), zero in rows that the tile does not have."""
    i = tl.arange(0, BM)
    r = block * BR + tl.arange(0, BR)
    return tl.load(h + (place + i)[:, None].to(tl.int64) * R + r[None, :], mask=i[:, None] < filled, other=0.0)


@triton.jit
def expand(
    h, factor, like, order, first, rows, start, rank, count, added, y,
    N: tl.constexpr, R: tl.constexpr, GRID: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[rows] = added[rows] + h @ factor[ranks]; y and `added` are one array, and rows in no tile keep what is there.

    factor (total, N), multiplied in the dtype of `like`; y (rows, N).
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i = tl.arange(0, BM)
    for tile in range(tl.program_id(0), tl.load(count), GRID):
        filled = tl.load(rows + tile)
        ranks = tl.load(rank + tile)
        place = tl.load(first + tile)
        acc = tl.zeros((BM, BN), tl.float32)
        for block in range(0, (ranks + BR - 1) // BR):
            r = block * BR + tl.arange(0, BR)
            low = load_low(h, place, filled, block, R, BM, BR)
            stored = tl.load(start + tile) + tl.minimum(r, ranks - 1)
            right = load_rows(factor, stored, tl.program_id(1) * BN, N, BN)
            # Zero times what another adapter's last row holds is not zero if that is no number.
            right = tl.where(r[:, None] < ranks, right, 0.0).to(like.dtype.element_ty)
            acc = tl.dot(low.to(right.dtype), right, acc, input_precision=PRECISION)
        row = tl.load(order + place + tl.minimum(i, filled - 1))
        at = row[:, None].to(tl.int64) * N + n[None, :]
        old = load_rows(added, row, tl.program_id(1) * BN, N, BN).to(tl.float32)
        if N % BN == 0:
            tl.store(y + at, (old + acc).to(y.dtype.element_ty), mask=i[:, None] < filled)
        else:
            tl.store(y + at, (old + acc).to(y.dtype.element_ty), mask=(i[:, None] < filled) & (n[None, :] < N))


@triton.jit
def grad(
    h, x, order, first, rows, start, rank, run, run_tiles, runs, zeros, g,
    K: tl.constexpr, R: tl.constexpr, GRID: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g[ranks] += sum over the adapter's tiles of h^T @ x[rows]; g (total, K) float32 begins as `zeros`, one array.

    Added atomically: two runs may meet in the same ranks.
    """
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    block = tl.program_id(2)
    i = tl.arange(0, BM)
    r = block * BR + tl.arange(0, BR)
    for which in range(tl.program_id(0), tl.load(runs), GRID):
        begin = tl.load(run + which)
        ranks = tl.load(rank + begin)
        if block * BR < ranks:
            acc = tl.zeros((BR, BK), tl.float32)
            for tile in range(begin, begin + tl.load(run_tiles + which)):
                place = tl.load(first + tile)
                filled = tl.load(rows + tile)
                row = tl.load(order + place + tl.minimum(i, filled - 1))
                right = load_rows(x, row, tl.program_id(1) * BK, K, BK)
                low = load_low(h, place, filled, block, R, BM, BR).to(right.dtype)
                acc = tl.dot(tl.trans(low), right, acc, input_precision=PRECISION)
            stored = tl.load(start + begin) + r
            at = g + stored[:, None].to(tl.int64) * K + k[None, :]
            tl.atomic_add(at, acc, mask=(r[:, None] < ranks) & (k[None, :] < K), sem="relaxed")
