"""The mean of a slice's scales, summed in the order of bitsandbytes' host library, torch.

A float32 sum depends on its order, and the second-level codes depend on the mean to its last bit. torch sums 32
interleaved lanes (four vectors of eight), each in a cascade of four levels; from 32,768 numbers on it first splits
them over its threads, so the last bit of bitsandbytes' own offset depends on the machine. Here: two threads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

_LANES, _VECTORS, _LEVELS = 8, 4, 4
_GRAIN = 32768
THREADS = 2


def mean(x: Float32[Array, "n"], threads: int = THREADS) -> Float32[Array, ""]:
    """sum(x) / n, bit for bit as torch computes it on a CPU with that many threads."""
    sum_ = total(x, threads)
    # The compiler turns a division by a constant, or by one number for all of a mapped batch, into a product with the
    # inverse. So the count is made to look like data, and like data of each batch element.
    count = jnp.where(sum_ == sum_, jnp.float32(x.shape[0]), jnp.float32(1))
    return sum_ / jax.lax.optimization_barrier(count)


def total(x: Float32[Array, "n"], threads: int = 1) -> Float32[Array, ""]:
    """The sum in torch's order."""
    n = x.shape[0]
    if threads > 1 and n >= _GRAIN:
        used = min(threads, -(-n // _GRAIN))
        chunk = -(-n // used)
        parts = [total(x[i : i + chunk]) for i in range(0, n, chunk)]
        return total(jnp.stack([*parts, *[jnp.float32(0)] * (threads - len(parts))]))
    if n < _LANES:
        return _row(x[:, None])[0]
    whole = n - n % _LANES
    lanes = _row(x[:whole].reshape(-1, _LANES))
    # The rest comes first, then the lanes, one by one.
    return _fold(jnp.concatenate([x[whole:], lanes]))


def _row(x: Float32[Array, "n lanes"]) -> Float32[Array, "lanes"]:
    """Sum along the first axis: four interleaved cascades, what is left over goes to the first."""
    n, lanes = x.shape
    whole = n - n % _VECTORS
    parts = _cascade(x[:whole].reshape(-1, _VECTORS, lanes))
    first = _fold(jnp.concatenate([parts[:1], x[whole:]]))
    return _fold(jnp.concatenate([first[None], parts[1:]]))


def _cascade(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """Sums of steps, sums of those sums, four levels deep; the unfinished part of each level is added at the end."""
    n = x.shape[0]
    power = max(4, (max(n, 1) - 1).bit_length() // _LEVELS)
    step = 1 << power
    rests = []
    for _ in range(_LEVELS - 1):
        whole = x.shape[0] - x.shape[0] % step
        rests.append(_fold(x[whole:]))
        x = _fold(jnp.swapaxes(x[:whole].reshape(-1, step, *x.shape[1:]), 0, 1))
    return _fold(jnp.stack([*rests, _fold(x)]))


def _fold(x: Float32[Array, "n *lanes"]) -> Float32[Array, "*lanes"]:
    """One after the other along the first axis, from zero."""
    return jax.lax.scan(lambda sum_, row: (sum_ + row, None), jnp.zeros(x.shape[1:], x.dtype), x)[0]
