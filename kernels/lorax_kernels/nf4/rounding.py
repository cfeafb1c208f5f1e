"""A product that is rounded before a sum: what a format that is exact to the bit asks of a compiler."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(product: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The product itself, out of reach of a fused multiply-add, which would round product and sum only once.

    Compilers fuse a multiplication with the addition that takes its result. An optimization barrier does not stop
    them: XLA drops it before it writes loops, and LLVM then sees both operations. The maximum with the least finite
    number changes no finite value (and keeps NaN), and cannot be dropped, since only who knows the values knows that.
    """
    return jnp.maximum(product, jnp.finfo(product.dtype).min)
