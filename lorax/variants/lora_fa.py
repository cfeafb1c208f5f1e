"""LoRA-FA: A stays where it started, B alone trains.

    W = W0 + s A B,    dL/dB = s A^T dW,    A constant

The input of a layer then matters to the backward pass through x A alone, r numbers a token instead of d. Source: Zhang
et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorax.weights import LowRank, register


@register
@dataclass(frozen=True, eq=False)
class FrozenA(LowRank):
    """A `LowRank` whose A does not train: the same equation, half the parameters."""

    KIND: ClassVar[str] = "lora-fa"
    TRAINS: ClassVar[frozenset[str]] = frozenset({"B"})


def build(leaf: LowRank) -> FrozenA:
    """The leaf with its A frozen."""
    return FrozenA(leaf.base, leaf.A, leaf.B, leaf.scale, leaf.axes, leaf.dropout)
