"""Weights in pieces along axis 0: what touches one piece takes that piece; what needs all of them joins them.

Joining copies, but it sums nothing: pieces of plain arrays are the user's own weight. Pieces that hold a low-rank
change are never joined silently.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.interpreter import Interpreter, rule
from lorax.lift.values import Pieces, Unsupported, Value


def cut(weight: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) along axis 0 of an array or a value whose leaves carry that axis."""
    if not isinstance(weight, Pieces):
        size = weight.shape[0]
        if (start, stop) == (0, size):
            return weight
        return jax.tree.map(
            lambda x: jax.lax.slice_in_dim(x, start, stop) if x.ndim and x.shape[0] == size else x, weight
        )
    kept, at = [], 0
    for part in weight.parts:
        low, high = max(start - at, 0), min(stop - at, part.shape[0])
        if low < high:
            kept.append(cut(part, low, high))
        at += part.shape[0]
    return kept[0] if len(kept) == 1 else Pieces(tuple(kept), weight.path)


@rule("slice", Pieces)
def slice_(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    start, stop = eqn.params["start_indices"][0], eqn.params["limit_indices"][0]
    strides = eqn.params["strides"]
    if (strides is not None and strides[0] != 1) or start == stop:
        return interp.bind(eqn, [join(weight)])
    rows = cut(weight, start, stop)
    if isinstance(rows, Pieces):
        rows = join(rows)
    tail_start = (0, *eqn.params["start_indices"][1:])
    tail_stop = (stop - start, *eqn.params["limit_indices"][1:])
    if tail_start == (0,) * rows.ndim and tail_stop == tuple(rows.shape):
        return [rows]
    if isinstance(rows, Value):
        raise Unsupported("a slice across a weight in pieces is served along axis 0 only")
    return [jax.lax.slice(rows, tail_start, tail_stop, strides)]


def join(weight: Pieces) -> jax.Array:
    """The pieces as one array."""
    if any(isinstance(part, Value) for part in weight.parts):
        raise Unsupported("a weight in pieces, one of them with a low-rank change, can only be scanned or sliced")
    return jnp.concatenate(weight.parts, axis=0)


def _joined(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    return interp.bind(eqn, [join(arg) if isinstance(arg, Pieces) else arg for arg in args])


for _name in (
    *("dot_general", "ragged_dot_general", "conv_general_dilated", "gather", "transpose", "reshape"),
    *(
        "broadcast_in_dim",
        "squeeze",
        "dynamic_slice",
        "split",
        "unstack",
        "add",
        "sub",
        "sharding_constraint",
    ),
):
    rule(_name, Pieces)(_joined)
