"""The TPU's order of NF4 codes: int32 words that unpack into bf16 tiles without moving data between lanes or rows.

A word holds eight codes of one column of W (k, n). Rows of W are taken in blocks of 64, each of which fills eight
consecutive words (r = 0..7), and W[k, n] is a nibble of word 8g + r:

    k = 64g + 16j + 2r + h    is nibble 4h + j,    h in 0..1, j in 0..3

`(word >> 4j) & 0x000F000F` is then a pair of codes in the two halves of a 32-bit register, which is how a TPU holds
rows 2r and 2r + 1 of a 16-bit tile. The scale of block g = 8G + i and column n is at [G, i, n]: an index along the
leading axis needs no alignment.

K is padded to a multiple of 512 and N to one of 128, by blocks whose scale is zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

BLOCK = 64
GROUP_ROWS = 512
LANES = 128


def padded(k: int, n: int) -> tuple[int, int]:
    """The shape that W [k, n] takes in this layout."""
    return -(-k // GROUP_ROWS) * GROUP_ROWS, -(-n // LANES) * LANES


def pack(
    codes: UInt8[Array, "n k_half"], scales: Float32[Array, "n blocks"]
) -> tuple[Int32[Array, "words n_padded"], Float32[Array, "groups 8 n_padded"]]:
    """Codes and scales of W^T, two codes a byte with the even one in the high nibble, to words and scales of W.

    Raises:
        ValueError: rows that are not whole blocks of 64.
    """
    n, k = codes.shape[0], 2 * codes.shape[1]
    if k % BLOCK or scales.shape != (n, k // BLOCK):
        raise ValueError(
            f"codes {codes.shape} with scales {scales.shape} are not blocks of {BLOCK}: quantise with block_size=64"
        )
    kp, np_ = padded(k, n)
    codes = jnp.pad(codes, ((0, np_ - n), (0, (kp - k) // 2)))
    scales = jnp.pad(scales, ((0, np_ - n), (0, (kp - k) // BLOCK)))
    # Byte 8j + r of a block holds k = 16j + 2r in its high nibble and the next in its low one.
    parts = codes.reshape(np_, kp // BLOCK, 4, 8).astype(jnp.uint32)
    even, odd = parts >> 4, parts & 15
    shift = (4 * jnp.arange(4, dtype=jnp.uint32))[:, None]
    words = jnp.sum((even << shift) | (odd << (shift + 16)), axis=2, dtype=jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(np_, kp // 8).T
    return words, scales.T.reshape(kp // GROUP_ROWS, GROUP_ROWS // BLOCK, np_)


def unpack(
    words: Int32[Array, "words n_padded"], scales: Float32[Array, "groups 8 n_padded"], k: int, n: int
) -> tuple[UInt8[Array, "n k_half"], Float32[Array, "n blocks"]]:
    """The inverse of `pack` for W [k, n]."""
    kp, np_ = 8 * words.shape[0], words.shape[1]
    parts = jax.lax.bitcast_convert_type(words, jnp.uint32).T.reshape(np_, kp // BLOCK, 1, 8)
    shift = (4 * jnp.arange(4, dtype=jnp.uint32))[:, None]
    even, odd = (parts >> shift) & 15, (parts >> (shift + 16)) & 15
    codes = ((even << 4) | odd).astype(jnp.uint8).reshape(np_, kp // 2)[:n, : k // 2]
    return codes, scales.reshape(kp // BLOCK, np_).T[:n, : k // BLOCK]
