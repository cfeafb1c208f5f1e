"""MiLoRA: the factors start as the minor part of the weight, and the rest becomes the base.

    W = U S V;      A = U_-r sqrt(S_-r / s),   B = sqrt(S_-r / s) V_-r,   W_res = W - s A B

-r the r smallest singular triples: training moves what the weight uses least, and keeps what it knows. `milora-fast`
finds them by subspace iteration with the inverse. Source: Wang et al. 2024, "MiLoRA: Harnessing Minor Singular
Components for Parameter-Efficient LLM Finetuning".
"""

from __future__ import annotations

import lorax.linalg as linalg
from lorax.variants.start import Matrix, Pair, shared_out


def milora(m: Matrix) -> Pair:
    """The r smallest singular triples, exactly."""
    return shared_out(linalg.bottom(m.weight(), m.rank), m.scale)


def milora_fast(m: Matrix) -> Pair:
    """The r smallest singular triples by subspace iteration with the inverse."""
    return shared_out(linalg.bottom_fast(m.key, m.weight(), m.rank), m.scale)
