"""Rows of a weight by index: an embedding lookup is a product with one-hot rows, (W + s A B)[i] = W[i] + s A[i] B."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.values import Factored, Unsupported, Value, densify


@rule("gather", Factored)
def gather(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Whole rows along some axes. Looked up along a stacked axis the result is still a weight (one expert a row);

    along an axis of A or of B it is an activation, base rows plus the low-rank rows.
    """
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, indices = args
    params = eqn.params
    numbers = params["dimension_numbers"]
    indexed = tuple(numbers.start_index_map)
    check_whole_rows(weight, numbers, params["slice_sizes"])
    (base,) = interp.bind(eqn, [weight.base, indices])
    out = weight.each(base, lambda x, extra: gather_factor(weight, x, indices, params, extra))
    if all(weight.is_stacked(axis) for axis in indexed):
        return [out]
    return [densify(out.base) + out.delta().astype(out.dtype)]


def check_whole_rows(weight: Value, numbers: Any, sizes: Any) -> None:
    """Refuse a lookup of anything but whole rows."""
    if numbers.operand_batching_dims:
        raise Unsupported("a gather with batching dimensions is not served")
    indexed = set(numbers.start_index_map)
    whole = all(
        (sizes[axis] == 1 and axis in numbers.collapsed_slice_dims)
        if axis in indexed
        else sizes[axis] == weight.shape[axis] and axis not in numbers.collapsed_slice_dims
        for axis in range(weight.ndim)
    )
    if not whole:
        raise Unsupported("only whole rows can be gathered")


def gather_factor(weight: Value, x: jax.Array, indices: jax.Array, params: Any, extra: int) -> jax.Array:
    """The rows that a lookup takes of one array that broadcasts against the weight."""
    numbers = params["dimension_numbers"]
    indexed = tuple(numbers.start_index_map)
    full = [x.shape[axis] == weight.shape[axis] for axis in indexed]
    out_ndim = len(numbers.offset_dims) + indices.ndim - 1
    if not any(full):
        return _without_rows(x, indexed, numbers.offset_dims, out_ndim, extra)
    if not all(full):
        raise Unsupported("the looked-up axes are split between A and B; pass fn and args to adapt")
    sizes = tuple(1 if axis in indexed else x.shape[axis] for axis in range(x.ndim))
    offsets = tuple(numbers.offset_dims) + ((out_ndim,) if extra else ())
    return jax.lax.gather(
        x,
        indices,
        numbers._replace(offset_dims=offsets),
        sizes,
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=params["mode"],
        # A row outside the weight has the fill value of the base, and no change on top of it.
        fill_value=0 if params["fill_value"] is not None else None,
    )


def _without_rows(x: jax.Array, indexed: Any, offset_dims: Any, out_ndim: int, extra: int) -> jax.Array:
    """A factor that the index does not touch: its rows broadcast over the looked-up ones."""
    shape = [1] * out_ndim
    rest = [size for axis, size in enumerate(x.shape[: x.ndim - extra]) if axis not in indexed]
    for position, size in zip(offset_dims, rest, strict=True):
        shape[position] = size
    return jnp.reshape(x, (*shape, *(x.shape[-1:] if extra else ())))
