"""Inside a TPU kernel: a block of words and scales becomes bf16 or float32 values in VMEM.

    value = NF4[code] * scale, rounded once

Which lookup is cheapest depends on the generation, so the chip is named when a kernel is traced:

- v6e, tpu7x gather 16-bit rows: one gather from a bf16 table of sixteen rows that the scale of each lane already
  multiplies.
- v5e, v5p gather 32-bit rows, eight at most: a row of the table holds entry e in its low half and e + 8 in its high
  half; bit 3 of the code is a shift by 16.
- float32 values take two gathers and a select on every generation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.nf4.codebooks import NF4
from lorax_kernels.nf4_matmul.layout_tpu import BLOCK, GROUP_ROWS, LANES

GATHER_16 = ("v6e", "tpu7x")
GATHER_32 = ("v5e", "v5p")
CHIPS = GATHER_32 + GATHER_16
_BLOCKS = GROUP_ROWS // BLOCK
_WORDS = GROUP_ROWS // 8
# Columns that one program text dequantises: fewer pay more for the ends of the loop, more spill.
_COLUMNS = 512


def codebook(chip: str, dtype: Any) -> jax.Array:
    """The operand `table` of the kernels, float32 (16, 128): the codebook in the order that the lookup wants."""
    order = np.arange(16)
    if dtype == jnp.bfloat16 and chip in GATHER_32:
        order = np.stack([np.arange(8), np.arange(8) + 8], axis=1).reshape(-1)
    # Written as literals: an array captured from outside could not go through custom_partitioning.
    return jnp.stack([jnp.full((LANES,), float(value), jnp.float32) for value in NF4[order]])


def dequantise_block(words: Any, scales: Any, table: Any, out: Any, chip: str, columns: int) -> None:
    """Dequantise a block in VMEM.

    Args:
        words: ref int32 (rows / 8, columns); rows a multiple of 64.
        scales: ref float32 (groups, 8, columns).
        table: ref float32 (16, 128), from `codebook`.
        out: ref for the values (rows, columns): float32, bf16, or int32 (rows / 2, columns) whose words are pairs of
            bf16 rows, which takes least time.
        chip: the generation.
        columns: how many columns there are.
    """
    rows = 8 * words.shape[0]
    wide = out.dtype == jnp.float32
    one = _wide_blocks if wide else _pair_blocks
    kept = GROUP_ROWS // 2 if out.dtype == jnp.int32 else GROUP_ROWS

    def part(group: Any, blocks: int, first: Any, width: int) -> None:
        """Blocks from a group on, in columns from `first`. What is in here has an offset known to the compiler."""
        lanes = pl.ds(first, width)
        one(
            words.at[pl.ds(pl.multiple_of(group * _WORDS, _WORDS), 8 * blocks), lanes],
            scales.at[pl.ds(group, -(-blocks // _BLOCKS)), :, lanes],
            table,
            out.at[pl.ds(pl.multiple_of(group * kept, kept), kept * blocks // _BLOCKS), lanes],
            chip,
        )

    whole, rest = divmod(rows, GROUP_ROWS)
    pieces, narrow = divmod(columns, _COLUMNS)

    if pieces:

        @pl.loop(0, whole * pieces)
        def _(step: Any) -> None:
            group, piece = lax.div(step, jnp.int32(pieces)), lax.rem(step, jnp.int32(pieces))
            part(group, _BLOCKS, pl.multiple_of(piece * _COLUMNS, _COLUMNS), _COLUMNS)

    if narrow:
        # Fewer columns, more rows at a time.
        groups = next(groups for groups in (4, 2, 1) if whole % groups == 0 and groups * narrow <= _COLUMNS)

        @pl.loop(0, whole // groups)
        def _(step: Any) -> None:
            part(step * groups, groups * _BLOCKS, columns - narrow, narrow)

    if rest:
        for first in range(0, columns, _COLUMNS):
            part(whole, rest // BLOCK, first, min(_COLUMNS, columns - first))


def _tiles(words: Any) -> Iterator[tuple[int, Any]]:
    """Where words of a block and a tile of columns are: (block, lanes)."""
    rows, columns = words.shape
    return itertools.product(range(rows // 8), (pl.ds(lane, LANES) for lane in range(0, columns, LANES)))


def _pair_blocks(words: Any, scales: Any, table: Any, out: Any, chip: str) -> None:
    pairs = _pairs_16 if chip in GATHER_16 else _pairs_32
    for block, lanes in _tiles(words):
        scaled = (table[...] * scales[block // _BLOCKS, pl.ds(block % _BLOCKS, 1), lanes]).astype(jnp.bfloat16)
        for j, values in enumerate(pairs(words[pl.ds(8 * block, 8), lanes], scaled)):
            if out.dtype == jnp.int32:
                out[pl.ds(32 * block + 8 * j, 8), lanes] = values
            else:
                out[pl.ds(64 * block + 16 * j, 16), lanes] = pltpu.bitcast(values, out.dtype)


def _pairs_16(word: jax.Array, scaled: jax.Array) -> list[jax.Array]:
    """Four int32 (8, 128), each a bf16 tile of 16 rows, by 16-bit gathers."""
    out = []
    for j in range(4):
        codes = lax.shift_right_logical(word, 4 * j) & 0x000F000F
        out.append(pltpu.bitcast(_gather(scaled, pltpu.bitcast(codes, jnp.int16)), jnp.int32))
    return out


def _pairs_32(word: jax.Array, scaled: jax.Array) -> list[jax.Array]:
    """The same by 32-bit gathers of two candidates for each code."""
    candidates = pltpu.bitcast(scaled, jnp.int32)
    inverse = ~word
    out = []
    for j in range(4):
        even = _gather(candidates, lax.shift_right_logical(word, 4 * j) & 7)
        odd = _gather(candidates, lax.shift_right_logical(word, 4 * j + 16) & 7)
        # Bit 3 of the code, moved to where it counts 16.
        upper = (lax.shift_right_logical(word, 4 * j - 1) if j else word << 1) & 16
        lower = lax.shift_right_logical(inverse, 4 * j + 15) & 16
        even = lax.shift_right_logical(even, upper) & 0xFFFF
        odd = lax.shift_left(odd, lower) & jnp.int32(-65536)
        out.append(even | odd)
    return out


def _wide_blocks(words: Any, scales: Any, table: Any, out: Any, chip: str) -> None:
    for block, lanes in _tiles(words):
        scale = scales[block // _BLOCKS, pl.ds(block % _BLOCKS, 1), lanes]
        low, high = table[pl.ds(0, 8), :] * scale, table[pl.ds(8, 8), :] * scale
        for j in range(4):
            for h in range(2):
                code = lax.shift_right_logical(words[pl.ds(8 * block, 8), lanes], 4 * (4 * h + j))
                values = jnp.where((code & 8) == 0, _gather(low, code & 7), _gather(high, code & 7))
                out[pl.ds(64 * block + 16 * j + h, 8, 2), lanes] = values


def _gather(table: jax.Array, index: jax.Array) -> jax.Array:
    """out[i, l] = table[index[i, l], l]"""
    return lax.gather(
        table,
        index[..., None],
        lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
            operand_batching_dims=(1,),
            start_indices_batching_dims=(1,),
        ),
        slice_sizes=(1, 1),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
