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
            bf16 rows. A bf16 ref is written in half tiles on v5e, which takes longer.
        chip: the generation.
        columns: how many columns there are.
    """
    rows = 8 * words.shape[0]
    wide = out.dtype == jnp.float32
    one = _wide_block if wide else _pair_block

    def group(index: Any, blocks: int) -> None:
        for block in range(blocks):
            for lane in range(0, columns, LANES):
                lanes = pl.ds(lane, LANES)
                row = pl.multiple_of(index * (GROUP_ROWS // 8) + 8 * block, 8)
                scale = scales[index, pl.ds(block, 1), lanes]
                one(words[pl.ds(row, 8), lanes], scale, table, out, row, lanes, chip)

    whole, rest = divmod(rows, GROUP_ROWS)

    @pl.loop(0, whole)
    def _(index: Any) -> None:
        group(index, _BLOCKS)

    if rest:
        group(whole, rest // BLOCK)


def _pair_block(word: jax.Array, scale: jax.Array, table: Any, out: Any, row: Any, lanes: Any, chip: str) -> None:
    scaled = (table[...] * scale).astype(jnp.bfloat16)
    pairs = _pairs_16 if chip in GATHER_16 else _pairs_32
    for j, values in enumerate(pairs(word, scaled)):
        if out.dtype == jnp.int32:
            out[pl.ds(pl.multiple_of(4 * row + 8 * j, 8), 8), lanes] = values
        else:
            out[pl.ds(pl.multiple_of(8 * row + 16 * j, 16), 16), lanes] = pltpu.bitcast(values, out.dtype)


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


def _wide_block(word: jax.Array, scale: jax.Array, table: Any, out: Any, row: Any, lanes: Any, chip: str) -> None:
    low, high = table[pl.ds(0, 8), :] * scale, table[pl.ds(8, 8), :] * scale
    for j in range(4):
        for h in range(2):
            code = lax.shift_right_logical(word, 4 * (4 * h + j))
            values = jnp.where((code & 8) == 0, _gather(low, code & 7), _gather(high, code & 7))
            out[pl.ds(8 * row + 16 * j + h, 8, 2), lanes] = values


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
