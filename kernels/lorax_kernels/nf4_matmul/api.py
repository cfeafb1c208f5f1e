"""`matmul` and `lora_matmul`: the table chooses who computes them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lorax_kernels.dispatch import Shapes, explain
from lorax_kernels.nf4.array import QuantizedArray
from lorax_kernels.nf4_matmul import xla


def matmul(
    x: Float[Array, "*rows k"],
    q: QuantizedArray,
    transpose: bool = False,
    post: xla.Post | None = None,
    extras: tuple[jax.Array, ...] = (),
    **options: Any,
) -> Float[Array, "*rows n"]:
    """x @ W (or x @ W^T) for a 4-bit W.

    Args:
        x: activations; `(*rows, n)` for the transposed product.
        q: W as (n, k): blocks along the inputs of each output; nf4 or fp4, no stacked axes.
        transpose: multiply with W^T instead.
        post, extras: an elementwise function of the dequantised values (and arrays it takes), for plain JAX alone.
        options: `precision`, `preferred_element_type`, as `jax.lax.dot_general` has them.

    Returns:
        The product in x's dtype (or `preferred_element_type`). Differentiable in x; W has no gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_kernels import nf4, nf4_matmul
        >>> nf4_matmul.matmul(jnp.ones((3, 64)), nf4.quantize(jnp.ones((5, 64)))).shape
        (3, 5)
    """
    backend = serves(x, q, transpose, post is not None, 0, options)
    q = _at_use(q)
    if backend == "xla":
        return xla.matmul(x, q, transpose, post, extras, **options)
    from lorax_kernels.nf4_matmul import kernels

    return kernels.matmul(backend, x, q, transpose)


def lora_matmul(
    x: Float[Array, "*rows k"],
    q: QuantizedArray,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
) -> Float[Array, "*rows n"]:
    """x W + scale (x A) B in one pass over x where a kernel serves it.

    Returns:
        The sum in x's dtype. Differentiable in x, a, b and scale.
    """
    backend = serves(x, q, False, False, a.shape[-1], {})
    q = _at_use(q)
    if backend == "xla":
        h = jnp.matmul(x, a.astype(x.dtype)) * scale.astype(x.dtype)
        return xla.matmul(x, q) + jnp.matmul(h, b.astype(x.dtype))
    from lorax_kernels.nf4_matmul import kernels

    return kernels.lora_matmul(backend, x, q, a, b, scale)


def _at_use(q: QuantizedArray) -> QuantizedArray:
    """The weight for the moment of its use: parts that lie on the axes of the rows (FSDP) brought together, packed.

    Said outright, because a compiler may as well dequantise each part first and move eight times the bytes.
    """
    place = q.placement
    if place is None or not set(place.rows) & set(place.core):
        return q
    outs, ins = (None if name in place.rows else name for name in place.core)

    def put(x: jax.Array, *names: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, PartitionSpec(*names)))

    codes = put(q.codes, ins, outs) if q.layout == "tpu" else put(q.codes, outs, ins)
    return replace(q, codes=codes, scales=None if q.scales is None else put(q.scales, outs, ins))


def serves(x: Any, q: QuantizedArray, transpose: bool, post: bool, rank: int, options: dict[str, Any]) -> str:
    """The backend that the table chooses for a product."""
    n, k = q.slice_shape
    wanted = options.get("preferred_element_type")
    # A kernel returns what it was given, and knows no function of the weights.
    if post or q.format != "nf4" or wanted not in (None, x.dtype) or options.get("precision") is not None:
        return "xla"
    rows = math.prod(x.shape[:-1])
    if q.placement is not None:
        rows, k, n = q.placement.local(rows, k, n)
    shapes = Shapes(rows, k, n, str(x.dtype), q.block_size, rank)
    return explain("nf4_matmul_t" if transpose else "nf4_matmul", shapes).chosen
