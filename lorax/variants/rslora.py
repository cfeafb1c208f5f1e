"""rsLoRA: a scale that falls with the square root of the rank.

    W = W0 + alpha / sqrt(r) * A B        (plain LoRA: alpha / r)

With alpha / r the change that a step makes shrinks as the rank grows, so that high ranks learn no more than low ones;
with alpha / sqrt(r) its size stays. Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning
with LoRA".
"""

from __future__ import annotations

import math


def scale(alpha: float, rank: int) -> float:
    """alpha / sqrt(rank).

    Example:
        >>> scale(16.0, 64)
        2.0
    """
    return alpha / math.sqrt(rank)
