"""Triton kernels over NF4 weights in bitsandbytes' own bytes: nothing is repacked.

    codes uint8 (N, K/2)     byte b of row n holds k = 2b in its high half and k = 2b + 1 in its low one
    scales float32 (N, K/BS)
    W[k, n] = NF4[code] * scale

Every shape is a compile-time constant: with run-time integers the compiler cannot see that rows are aligned, and falls
back to loads of one or two bytes. Inputs come first among the arguments, outputs last, as jax-triton wants them.
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nf4_values(code):
    """The codebook by a tree of selects, one level for each bit: a table in memory would be a load of its own."""
    b0 = (code & 1) != 0
    b1 = (code & 2) != 0
    b2 = (code & 4) != 0
    b3 = (code & 8) != 0
    v0 = tl.where(b0, -0.6961928009986877, -1.0)
    v1 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(b0, 0.0, -0.09105003625154495)
    v4 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(b0, 1.0, 0.7229568362236023)
    w0 = tl.where(b1, v1, v0)
    w1 = tl.where(b1, v3, v2)
    w2 = tl.where(b1, v5, v4)
    w3 = tl.where(b1, v7, v6)
    return tl.where(b3, tl.where(b2, w3, w2), tl.where(b2, w1, w0))


@triton.jit
def scaled(values, scale, BS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Half of a tile, every other input: (BN, BK/2) times its scales, which are (BN,) or (BN, BK/BS)."""
    if BS >= BK:
        out = values * scale[:, None]
    else:
        out = tl.reshape(tl.reshape(values, (BN, BK // BS, BS // 2)) * scale[:, :, None], (BN, BK // 2))
    return out


@triton.jit
def load_block(
    codes, scales, n0, k0, dtype: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows n0.. and inputs k0.. of the weight: (BN, BK) in dtype, zero outside."""
    n = n0 + tl.arange(0, BN)
    byte = k0 // 2 + tl.arange(0, BK // 2)
    at = codes + n[:, None] * (K // 2) + byte[None, :]
    whole: tl.constexpr = (N % BN == 0) and (K % BK == 0)
    if whole:
        packed = tl.load(at).to(tl.int32)
    else:
        packed = tl.load(at, mask=(n[:, None] < N) & (byte[None, :] < K // 2), other=0x77).to(tl.int32)
    if BS >= BK:
        # A block of scales covers the whole tile: one scale a row.
        where = scales + n * (K // BS) + k0 // BS
        scale = tl.load(where) if whole else tl.load(where, mask=n < N, other=0.0)
    else:
        block = k0 // BS + tl.arange(0, BK // BS)
        where = scales + n[:, None] * (K // BS) + block[None, :]
        if whole:
            scale = tl.load(where)
        else:
            scale = tl.load(where, mask=(n[:, None] < N) & (block[None, :] < K // BS), other=0.0)
    # Each half is rounded before they are joined: a tile in float32 would take twice the registers.
    even = scaled(nf4_values(packed >> 4), scale, BS, BN, BK).to(dtype)
    odd = scaled(nf4_values(packed & 15), scale, BS, BN, BK).to(dtype)
    return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def load_tile(base, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A tile (BR, BC) of a row-major array (ROWS, COLS), zero outside."""
    r = row0 + tl.arange(0, BR)
    c = col0 + tl.arange(0, BC)
    at = base + r[:, None] * COLS + c[None, :]
    if (ROWS % BR == 0) and (COLS % BC == 0):
        return tl.load(at)
    return tl.load(at, mask=(r[:, None] < ROWS) & (c[None, :] < COLS), other=0.0)


@triton.jit
def store_tile(base, row0, col0, value, ROWS: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    r = row0 + tl.arange(0, BR)
    c = col0 + tl.arange(0, BC)
    at = base + r[:, None] * COLS + c[None, :]
    if (ROWS % BR == 0) and (COLS % BC == 0):
        tl.store(at, value.to(base.dtype.element_ty))
    else:
        tl.store(at, value.to(base.dtype.element_ty), mask=(r[:, None] < ROWS) & (c[None, :] < COLS))


@triton.jit
def dequantise(
    codes, scales, out, N: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """out (N, K): W^T as torch holds it."""
    n0 = tl.program_id(0) * BN
    k0 = tl.program_id(1) * BK
    store_tile(out, n0, k0, load_block(codes, scales, n0, k0, out.dtype.element_ty, N, K, BS, BN, BK), N, K, BN, BK)


@triton.jit
def product(
    x, codes, scales, a, b, scale, y, h,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x W + scale (x A) B, one tile (BM, BN) a program; h = x A by the programs of the first columns.

    x (M, K), a (K, R), b (R, N), y (SPLIT, M, N), h (SPLIT, M, R); R = 0 leaves the low-rank term out. With SPLIT > 1
    each program takes its part of K, y and h are partial sums in float32, and the low-rank term is the caller's.
    """
    pid_m, pid_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, n0 = pid_m * BM, pid_n * BN
    steps: tl.constexpr = (K + BK - 1) // BK
    each: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    first = part * each
    acc = tl.zeros((BM, BN), tl.float32)
    if R > 0:
        low = tl.zeros((BM, R), tl.float32)
    for step in range(first, tl.minimum(first + each, steps) if SPLIT > 1 else steps):
        k0 = step * BK
        left = load_tile(x, m0, k0, M, K, BM, BK)
        if R > 0:
            low = tl.dot(left, load_tile(a, k0, 0, K, R, BK, R), low, input_precision=PRECISION)
        weight = load_block(codes, scales, n0, k0, left.dtype, N, K, BS, BN, BK)
        acc = tl.dot(left, tl.trans(weight), acc, input_precision=PRECISION)
    if R > 0:
        if pid_n == 0:
            store_tile(h + part * (M * R), m0, 0, low, M, R, BM, R)
        if SPLIT == 1:
            right = load_tile(b, 0, n0, R, N, R, BN)
            acc = tl.dot((low * tl.load(scale)).to(right.dtype), right, acc, input_precision=PRECISION)
    store_tile(y + part * (M * N), m0, n0, acc, M, N, BM, BN)


@triton.jit
def product_t(
    dy, codes, scales, a, b, scale, dx, dh,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = dy W^T + scale (dy B^T) A^T, one tile (BM, BK) a program; dh = dy B^T.

    The mirror of `product`: here N is summed over, and the weight's tile needs no transpose.
    """
    pid_m, pid_k, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, k0 = pid_m * BM, pid_k * BK
    steps: tl.constexpr = (N + BN - 1) // BN
    each: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    first = part * each
    acc = tl.zeros((BM, BK), tl.float32)
    if R > 0:
        low = tl.zeros((BM, R), tl.float32)
    for step in range(first, tl.minimum(first + each, steps) if SPLIT > 1 else steps):
        n0 = step * BN
        left = load_tile(dy, m0, n0, M, N, BM, BN)
        if R > 0:
            low = tl.dot(left, tl.trans(load_tile(b, 0, n0, R, N, R, BN)), low, input_precision=PRECISION)
        weight = load_block(codes, scales, n0, k0, left.dtype, N, K, BS, BN, BK)
        acc = tl.dot(left, weight, acc, input_precision=PRECISION)
    if R > 0:
        if pid_k == 0:
            store_tile(dh + part * (M * R), m0, 0, low, M, R, BM, R)
        if SPLIT == 1:
            right = load_tile(a, k0, 0, K, R, BK, R)
            acc = tl.dot((low * tl.load(scale)).to(right.dtype), tl.trans(right), acc, input_precision=PRECISION)
    store_tile(dx + part * (M * K), m0, k0, acc, M, K, BM, BK)
