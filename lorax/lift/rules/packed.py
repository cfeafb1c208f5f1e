"""Quantised weights: layout is noted down, products dequantise inside a checkpoint, lookups dequantise their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift import compat
from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.packed import Packed, Still
from lorax.lift.packed_product import as_product
from lorax.lift.values import Unsupported
from lorax_kernels.nf4 import take


def _use_up(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """The user's own operation on the dequantised weight, which is made anew in the backward pass.

    The checkpoint stands between the two passes: without it, the weight of the forward pass would be kept, or found
    again by the compiler, and every layer's 16-bit weight would be alive at once.
    """
    where = where_structured(args)
    weight, others = args[where], [arg for i, arg in enumerate(args) if i != where]

    def use(weight: Packed, others: list[Any]) -> list[Any]:
        return compat.bind(eqn, [*others[:where], weight.dense(), *others[where:]])

    return jax.checkpoint(use)(weight, others)


@rule("dot_general", Packed)
def dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """x @ W or x @ W^T of a matrix goes to the kernels; any other product uses the weight up where it stands."""
    product = as_product(eqn, args)
    return [product.run()] if product is not None else _use_up(interp, eqn, args)


for _name in ("ragged_dot_general", "conv_general_dilated", "add", "add_any", "sub"):
    rule(_name, Packed)(_use_up)


def _mark(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """An elementwise operation is done to the values when they are dequantised."""
    (weight,) = args
    dtype = eqn.outvars[0].aval.dtype
    step = lambda x, *extras: compat.bind(eqn, [x])[0]  # noqa: E731
    return [replace(weight, marks=(*weight.marks, step), final_dtype=dtype)]


for _name in ("copy", "copy_p", "name", "mesh_cast", "neg", "stop_gradient", "pvary"):
    rule(_name, Packed)(_mark)


@rule("convert_element_type", Packed)
def convert(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported(f"a cast to {eqn.params['new_dtype']} is not linear")
    # The equation's own sharding, if any, is of another shape once rows are looked up: cast, nothing more.
    dtype = eqn.params["new_dtype"]
    step = lambda x, *extras: jax.lax.convert_element_type(x, dtype)  # noqa: E731
    return [replace(args[0], marks=(*args[0].marks, step), final_dtype=dtype)]


def _scaled(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A scalar times the weight, or the weight over a scalar, is a mark; with an array it uses the weight up."""
    where = where_structured(args)
    weight, other = args[where], args[1 - where]
    if eqn.primitive.name == "div" and where != 0:
        raise Unsupported("a division by a structured weight is not linear")
    if jnp.ndim(other) != 0:
        return _use_up(interp, eqn, args)
    at = len(weight.extras)

    def step(x: jax.Array, *extras: jax.Array) -> jax.Array:
        return compat.bind(eqn, [x, extras[at]] if where == 0 else [extras[at], x])[0]

    return [replace(weight, marks=(*weight.marks, step), extras=(*weight.extras, jnp.asarray(other)))]


rule("mul", Packed)(_scaled)
rule("div", Packed)(_scaled)


def _view(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """An operation that moves or cuts axes is done after the weight is dequantised."""
    (weight,) = args
    outs = []
    for i, out in enumerate(eqn.outvars):
        step = lambda x, i=i: compat.bind(eqn, [x])[i]  # noqa: E731
        outs.append(weight.viewed(step, out.aval.shape))
    return outs


for _name in ("reshape", "broadcast_in_dim", "split", "sharding_constraint", "reshard", "rev"):
    rule(_name, Packed)(_view)


@rule("transpose", Packed)
def transpose(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A transpose that leaves the stacked axes in front costs nothing: the stored axes get other names."""
    (weight,) = args
    permutation, front = eqn.params["permutation"], len(weight.array.stack)
    if weight.views or tuple(permutation[:front]) != tuple(range(front)):
        return _view(interp, eqn, args)
    order = tuple(permutation.index(axis + front) - front for axis in weight.order)
    return [replace(weight, order=order)]


@rule("slice", Packed)
def slice_(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Some of the stacked weights: the same cut of every array. Any other slice is a view."""
    (weight,) = args
    front = len(weight.array.stack)
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim
    if weight.views or not _whole(weight, start, stop, strides, front):
        return _view(interp, eqn, args)
    cut = tuple(slice(*bounds) for bounds in zip(start[:front], stop[:front], strides[:front], strict=True))
    return [_on_stack(weight, lambda x: x[cut])]


def _whole(weight: Packed, start: Any, stop: Any, strides: Any, front: int) -> bool:
    return all((start[a], stop[a], strides[a]) == (0, size, 1) for a, size in enumerate(weight.shape) if a >= front)


def _on_stack(weight: Packed, function: Any) -> Packed:
    return replace(weight, array=jax.tree.map(function, weight.array))


@rule("squeeze", Packed)
def squeeze(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    gone, front = eqn.params["dimensions"], len(weight.array.stack)
    if weight.views or any(axis >= front for axis in gone):
        return _view(interp, eqn, args)
    return [_on_stack(weight, lambda x: jax.lax.squeeze(x, gone))]


@rule("unstack", Packed)
def unstack(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    if weight.views or eqn.params["axis"] != 0 or not weight.array.stack:
        return _view(interp, eqn, args)
    return [_on_stack(weight, lambda x, i=i: x[i]) for i in range(len(eqn.outvars))]


@rule("dynamic_slice", Packed)
def dynamic_slice(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """One layer out of a stack by a traced index is taken out packed; any other part uses the weight up."""
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, *starts = args
    sizes, front = eqn.params["slice_sizes"], len(weight.array.stack)
    if weight.views or tuple(sizes[front:]) != tuple(weight.shape[front:]):
        return _use_up(interp, eqn, args)

    def cut(x: jax.Array) -> jax.Array:
        for axis in range(front):
            # In range already: a negative start would count from the end once more.
            start = jnp.clip(starts[axis], 0, weight.shape[axis] - sizes[axis])
            x = jax.lax.dynamic_slice_in_dim(x, start, sizes[axis], axis)
        return x

    return [_on_stack(weight, cut)]


@rule("gather", Packed)
def gather(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Rows by index: only those are dequantised. Along a stacked axis the result is still packed (one expert a row)."""
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, indices = args
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axis = _row_axis(weight, numbers, sizes)
    front = len(weight.array.stack)
    rows = indices[..., 0]
    batch = tuple(i for i in range(rows.ndim + weight.ndim - 1) if i not in numbers.offset_dims)
    inside = (rows >= 0) & (rows < weight.shape[axis])
    safe = jnp.clip(rows, 0, weight.shape[axis] - 1)
    filled = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    if axis < front:
        if axis != 0 or batch != tuple(range(rows.ndim)) or weight.views:
            raise Unsupported("experts can be looked up along the first axis only, and stay in front")
        # A row outside the stack has NaN in its scales where the user's lookup fills with NaN.
        return [_on_stack(weight, lambda x: x.at[rows].get(mode="fill") if filled else x[safe])]
    if front:
        raise Unsupported("rows of stacked weights can be looked up in one of them at a time")
    out = weight.marked(take(weight.array, safe, weight.order.index(axis)).astype(weight.array.dtype))
    # take puts the looked-up axes first and the others in stored order; the user wants them at `batch` and in order.
    stored_rest = [a for a in weight.order if a != axis]
    rest = [a for a in range(weight.ndim) if a != axis]
    out = jnp.transpose(out, (*range(rows.ndim), *(rows.ndim + stored_rest.index(a) for a in rest)))
    if filled:
        fill = eqn.params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, out.dtype)
        out = jnp.where(inside.reshape(*inside.shape, *[1] * len(rest)), out, fill)
    return [jnp.moveaxis(out, range(rows.ndim), batch)]


def _row_axis(weight: Packed, numbers: Any, sizes: Any) -> int:
    if weight.views:
        raise Unsupported("rows are looked up in a quantised weight as it is, not after a reshape; reshape the rows")
    indexed = tuple(numbers.start_index_map)
    whole = all(
        sizes[axis] == (1 if axis in indexed else size) and (axis in numbers.collapsed_slice_dims) == (axis in indexed)
        for axis, size in enumerate(weight.shape)
    )
    if numbers.operand_batching_dims or len(indexed) != 1 or not whole:
        raise Unsupported("only whole rows along one axis can be gathered from a quantised weight")
    return indexed[0]


def _still(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Linear operations on zeros that do not move."""
    path = args[where_structured(args)].path
    keeps = eqn.primitive.name in _KEEPS
    return [Still(v.aval, path) if keeps else jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]


_KEEPS = (
    *("convert_element_type", "copy", "copy_p", "name", "mesh_cast", "neg", "stop_gradient", "pvary", "mul", "div"),
    *("reshape", "broadcast_in_dim", "split", "sharding_constraint", "reshard", "rev", "transpose", "slice"),
    *("squeeze", "unstack", "dynamic_slice"),
)
for _name in (*_KEEPS, "dot_general", "ragged_dot_general", "conv_general_dilated", "gather"):
    rule(_name, Still)(_still)
