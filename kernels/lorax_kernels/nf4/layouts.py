"""Orders of the same codes: by rows, as files and bitsandbytes have them, or in words, as a TPU unpacks them.

Nothing is lost either way. Scales keep their order, so double quantisation is the same in both.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from lorax_kernels.nf4.array import QuantizedArray


def for_platform(q: QuantizedArray, platform: str) -> QuantizedArray:
    """The array in the order that a platform's kernels read without moving it; as it is where there is none."""
    return to_tpu(q) if platform == "tpu" else q


def to_tpu(q: QuantizedArray) -> QuantizedArray:
    """Codes as int32 words `(*stack, k / 8, n)` for an NF4 matrix (n, k) whose sizes are whole tiles; else q itself.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_kernels import nf4
        >>> nf4.to_tpu(nf4.quantize(jnp.ones((128, 512)))).codes.shape
        (64, 128)
    """
    if q.layout == "tpu" or q.format != "nf4" or q.block_size != 64 or not q.is_regular or q.core_ndim != 2:
        return q
    n, k = q.slice_shape
    if n % 128 or k % 512:
        return q
    from lorax_kernels.nf4_matmul import layout_tpu

    def words(codes: jax.Array) -> jax.Array:
        return layout_tpu.pack(codes, jnp.zeros((n, k // 64), jnp.float32))[0]

    return replace(q, codes=_each(words, q.codes, len(q.stack)), layout="tpu")


def canonical(q: QuantizedArray) -> QuantizedArray:
    """The array with its codes by rows."""
    if q.layout == "rows":
        return q
    from lorax_kernels.nf4_matmul import layout_tpu

    n, k = q.slice_shape

    def rows(words: jax.Array) -> jax.Array:
        return layout_tpu.unpack(words, jnp.zeros((k // 512, 8, n), jnp.float32), k, n)[0]

    return replace(q, codes=_each(rows, q.codes, len(q.stack)), layout="rows")


def _each(function: object, codes: jax.Array, axes: int) -> jax.Array:
    for _ in range(axes):
        function = jax.vmap(function)  # pyright: ignore[reportArgumentType]
    return function(codes)  # pyright: ignore[reportCallIssue]
