"""OLoRA: the factors start as the first part of the weight's QR decomposition, orthonormal on the side of the outputs.

    W^T = Q R;      A = R_r^T / s,   B = Q_r^T,   W_res = W - s A B

Q_r the first r columns of Q, R_r the first r rows of R (in the paper W is out x in, B = Q_r and A = R_r, at s = 1):
W_res is W less its projection on the first r outputs of Q.

Source: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import jax.numpy as jnp

from lorax.variants.start import Matrix, Pair


def olora(m: Matrix) -> Pair:
    """The first r columns of Q and rows of R."""
    q, r = jnp.linalg.qr(jnp.swapaxes(m.weight(), -1, -2))
    return jnp.swapaxes(r[..., : m.rank, :], -1, -2) / m.scale, jnp.swapaxes(q[..., : m.rank], -1, -2)
