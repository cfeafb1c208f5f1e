"""PiSSA: the factors start as the principal part of the weight, and the rest becomes the base.

    W = U S V;      A = U_r sqrt(S_r / s),   B = sqrt(S_r / s) V_r,   W_res = W - s A B

r the r largest singular triples. W_res + s A B = W, so nothing changes at the start; training moves the directions in
which W is largest. `pissa-fast` finds them by a randomised SVD, as the paper does. Source: Meng et al. 2024,
"PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models".
"""

from __future__ import annotations

import lorax.linalg as linalg
from lorax.variants.start import Matrix, Pair, shared_out


def pissa(m: Matrix) -> Pair:
    """The r largest singular triples, exactly."""
    return shared_out(linalg.top(m.weight(), m.rank), m.scale)


def pissa_fast(m: Matrix) -> Pair:
    """The r largest singular triples by subspace iteration."""
    return shared_out(linalg.top_fast(m.key, m.weight(), m.rank), m.scale)
