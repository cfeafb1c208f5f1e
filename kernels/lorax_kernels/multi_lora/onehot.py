"""`multi_lora` by two plain products over the whole total rank, all ranks but a row's own masked.

It computes for every row what every adapter would add, so it is for banks whose ranks are few: there, two products that
a compiler knows how to tile beat any loop.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels.multi_lora.reference import owned, sum_dtype


def apply(
    y: Any, x: Any, a: Any, b: Any, a_start: Any, b_start: Any, rank: Any, weight: Any, options: Any
) -> jax.Array:
    wide = sum_dtype(x.dtype)
    mine, theirs = owned(a_start, rank, a.shape[0]), owned(b_start, rank, b.shape[0])
    a, b = _clean(a, mine).astype(x.dtype), _clean(b, theirs).astype(x.dtype)
    h = jnp.einsum("gtk,pk->gtp", x, a, precision=options.precision, preferred_element_type=wide)
    h = _moved(h, mine, a_start, b_start, b.shape[0]) * jnp.where(theirs, weight[:, None], 0).astype(wide)[:, None, :]
    out = jnp.einsum(
        "gtp,pn->gtn", h.astype(x.dtype), b, precision=options.precision, preferred_element_type=options.dtype
    )
    return out if y is None else y + out


def grad(x: Any, dy: Any, b: Any, b_start: Any, out_start: Any, rank: Any, weight: Any, options: Any) -> jax.Array:
    wide = sum_dtype(x.dtype)
    mine, theirs = owned(b_start, rank, b.shape[0]), owned(out_start, rank, options.total)
    b = _clean(b, mine).astype(dy.dtype)
    u = jnp.einsum("gtn,pn->gtp", dy, b, precision=options.precision, preferred_element_type=wide)
    u = _moved(u, mine, b_start, out_start, options.total)
    u = u * jnp.where(theirs, weight[:, None], 0).astype(wide)[:, None, :]
    out = jnp.einsum("gtp,gtk->pk", u.astype(x.dtype), x, precision=options.precision, preferred_element_type=wide)
    return out.astype(options.dtype)


def _clean(f: Any, mine: Any) -> Any:
    """The factor with zeros in the rows of nobody, which may hold anything."""
    return jnp.where(jnp.any(mine, axis=0)[:, None], f, jnp.zeros((), f.dtype))


def _moved(h: Any, mine: Any, start: Any, new_start: Any, total: int) -> Any:
    """Ranks where the other factor has them: each group's own columns, from `start` to `new_start`."""

    def gathered() -> Any:
        column = jnp.arange(total, dtype=start.dtype)
        source = jnp.clip(column - new_start[:, None] + start[:, None], 0, h.shape[-1] - 1)
        return jnp.take_along_axis(h, source[:, None, :], axis=-1)

    if h.shape[-1] != total:
        return gathered()
    # Both factors of a bank begin alike; a gather of single numbers costs a TPU more than the products do.
    return jax.lax.cond(jnp.all(start == new_start), lambda: h, gathered)
