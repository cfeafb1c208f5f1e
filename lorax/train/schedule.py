"""Learning rates over the steps of a run: a linear warm-up, then constant, cosine or linear decay."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from lorax.errors import LoraxError

Schedule = Callable[[ArrayLike], Array]

SHAPES: dict[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    # Each maps the fraction of the run after the warm-up, in [0, 1), to a factor of the peak rate.
    "constant": lambda t: jnp.ones_like(t),
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
}


def learning_rate(peak: float, steps: int, *, warmup: int = 0, shape: str = "constant") -> Schedule:
    """The rate of step i (counted from 0).

    During the warm-up `peak * (i + 1) / warmup`: the first step already learns. After it `peak * f(t)` with
    `t = (i - warmup) / (steps - warmup)` and f = 1, 1 - t or (1 + cos(pi t)) / 2: the last step still learns.

    Args:
        peak: the highest rate.
        steps: optimizer steps of the whole run.
        warmup: steps of linear warm-up, fewer than `steps`.
        shape: "constant", "cosine" or "linear".

    Raises:
        LoraxError: an unknown shape, or a warm-up that does not fit into the run.

    Example:
        >>> rate = learning_rate(1.0, 10, warmup=2, shape="linear")
        >>> [round(float(rate(i)), 3) for i in (0, 1, 2, 6)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if shape not in SHAPES:
        raise LoraxError(f"schedule {shape!r}: choose one of {', '.join(SHAPES)}")
    if not 0 <= warmup < max(steps, 1):
        raise LoraxError(f"warmup {warmup}: must be at least 0 and below the {steps} steps of the run")
    decay = SHAPES[shape]

    def rate(step):
        i = jnp.asarray(step, jnp.float32)
        after = decay(jnp.clip((i - warmup) / max(steps - warmup, 1), 0.0, 1.0))
        rising = (i + 1.0) / max(warmup, 1)
        return jnp.float32(peak) * jnp.where(i < warmup, rising, after)

    return rate
