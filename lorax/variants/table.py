"""The table: every scaling, kind of change and start by name. A new one is a file here and a row.

    scaling   alpha, rank -> scale
    variant   what of the change trains, and how it meets the weight
    start     the first values of A and B; some take them out of the weight, and the base is what is left

LoRA+ is none of these: it is a setting of the optimizer (`loraplus.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lorax.variants import dora, eva, lora_fa, milora, olora, pissa, rslora, start, vera
from lorax.variants.start import Matrix, Pair
from lorax.weights import LowRank

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": rslora.scale,
}


@dataclass(frozen=True)
class Start:
    """A row of INITS.

    factors: gives A and B.
    moves_base: s A B is taken out of the base, so that the sum starts at the weight.
    reads_inputs: it needs example inputs of the layers.
    """

    factors: Callable[[Matrix], Pair]
    moves_base: bool = False
    reads_inputs: bool = False


INITS: dict[str, Start] = {
    "gaussian": Start(start.gaussian),
    "uniform": Start(start.uniform),
    "pissa": Start(pissa.pissa, moves_base=True),
    "pissa-fast": Start(pissa.pissa_fast, moves_base=True),
    "milora": Start(milora.milora, moves_base=True),
    "milora-fast": Start(milora.milora_fast, moves_base=True),
    "olora": Start(olora.olora, moves_base=True),
    "eva": Start(eva.eva, reads_inputs=True),
}


@dataclass(frozen=True)
class Variant:
    """A row of VARIANTS.

    build: the leaf, from the low-rank one that starts it, the key of the whole adaptation and the factors' dtype.
    starts: the starts that make sense with it; all where it is None.
    """

    build: Callable[[LowRank, jax.Array, Any], Any]
    starts: tuple[str, ...] | None = None


VARIANTS: dict[str, Variant] = {
    "lora": Variant(lambda leaf, key, dtype: leaf),
    "dora": Variant(lambda leaf, key, dtype: dora.build(leaf)),
    "lora-fa": Variant(lambda leaf, key, dtype: lora_fa.build(leaf)),
    # Its factors are shared and random: no start of one weight is theirs.
    "vera": Variant(vera.build, ("gaussian",)),
}
