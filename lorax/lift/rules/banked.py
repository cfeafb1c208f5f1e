"""Weights with many adapters' changes: the base takes the user's own operation, the factors follow its axes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.banked import Banked
from lorax.lift.contract import arrange
from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.rules.shapes import axis_groups
from lorax.lift.values import Unsupported, densify


def _on_base(interp: Interpreter, eqn: Any, args: list[Any], weight: Banked) -> Any:
    return interp.bind(eqn, [weight.base if arg is weight else arg for arg in args])


@rule("dot_general", Banked)
def dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """x W + s_i (x A_i) B_i, the weight on either side; stacked axes may be batch dimensions."""
    side = where_structured(args)
    weight, x = args[side], args[1 - side]
    summed, batched = eqn.params["dimension_numbers"]
    first = _first(weight, summed[side])
    second = "b" if first == "a" else "a"
    if set(batched[side]) - set(weight.stack):
        raise Unsupported(f"axis {batched[side]} of {weight.shape} is a batch dimension and no stacked axis")
    (out,) = _on_base(interp, eqn, args, weight)
    shared = dict(zip(batched[1 - side] + summed[1 - side], batched[side] + summed[side], strict=True))
    x_labels = tuple(shared.get(axis, ("x", axis)) for axis in range(x.ndim))
    rows = tuple(label for label in x_labels if isinstance(label, tuple))
    gone = summed[side] + batched[side]
    free = tuple(axis for axis in range(weight.ndim) if axis not in gone)
    out_labels = (*batched[side], *((*free, *rows) if side == 0 else (*rows, *free)))
    x = _stacked(x, x_labels, (*weight.stack, *rows, *weight.features(first)), weight)
    # Axes of size one that belong to no factor go last in the result and come back from there.
    ones = tuple(axis for axis in free if axis not in weight.stack and axis not in weight.features(second))
    order = (*weight.stack, *rows, *weight.features(second), *ones)
    y = arrange(out, out_labels, order)
    lead = len(weight.stack) + len(rows)
    flat = (y.reshape(*y.shape[:lead], -1), x.reshape(*x.shape[:lead], -1))
    y = weight.product(*flat, first, eqn.params["precision"]).reshape(y.shape)
    return [arrange(y, order, out_labels)]


def _first(weight: Banked, summed: Any) -> str:
    """The factor that a product sums."""
    for which in ("a", "b"):
        if set(summed) == set(weight.features(which)):
            return which
    raise Unsupported(
        f"axes {tuple(summed)} of {weight.shape} are summed, and the factors were shaped for sums over "
        f"{weight.inputs} or {weight.outputs}; pass fn and args to adapt, so that the axes are read from the trace"
    )


def _stacked(x: jax.Array, labels: Any, order: Any, weight: Banked) -> jax.Array:
    """x in this order; a stacked axis that it lacks is one along which it is the same."""
    x = arrange(x, labels, order)
    sizes = [weight.shape[label] if label in weight.stack else x.shape[i] for i, label in enumerate(order)]
    return jnp.broadcast_to(x, sizes)


@rule("transpose", Banked)
def transpose(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    permutation = list(eqn.params["permutation"])
    (base,) = _on_base(interp, eqn, args, weight)
    return [weight.moved(base, permutation.index)]


@rule("squeeze", Banked)
def squeeze(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    gone = eqn.params["dimensions"]
    (base,) = _on_base(interp, eqn, args, weight)
    kept = [axis for axis in range(weight.ndim) if axis not in gone]
    layers = tuple(i for i, axis in enumerate(weight.stack) if axis in gone)
    weight = weight.on_stack(base, lambda x: jax.lax.squeeze(x, layers)) if layers else weight
    return [_renumbered(weight, base, {old: new for new, old in enumerate(kept)})]


def _renumbered(weight: Banked, base: Any, place: dict[int, int]) -> Banked:
    """Axes at new places; those that are gone had size one."""
    axes = (tuple(place[axis] for axis in group if axis in place) for group in weight._axes())
    stack, inputs, outputs = axes
    return replace(weight, base=base, stack=stack, inputs=inputs, outputs=outputs)


@rule("broadcast_in_dim", Banked)
def broadcast_in_dim(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if any(size != 1 for axis, size in enumerate(shape) if axis not in dims) or any(
        shape[new] != weight.shape[old] for old, new in enumerate(dims)
    ):
        raise Unsupported("a weight with a bank of adapters cannot be repeated along a new axis")
    (base,) = _on_base(interp, eqn, args, weight)
    return [weight.moved(base, lambda axis: dims[axis])]


@rule("reshape", Banked)
def reshape(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Axes of one factor may be merged and split among themselves."""
    (weight,) = args
    if eqn.params["dimensions"] is not None:
        raise Unsupported("a reshape that also permutes is not served")
    place: dict[int, tuple[int, ...]] = {}
    at = 0
    for old, sizes in axis_groups(weight.shape, tuple(eqn.params["new_sizes"])):
        new = tuple(range(at, at + len(sizes)))
        at += len(sizes)
        old = [axis for axis in old if weight.shape[axis] != 1]
        new = tuple(axis for axis, size in zip(new, sizes, strict=True) if size != 1)
        for group in weight._axes():
            inside = [axis for axis in group if axis in old]
            if inside and (inside != old or (group is weight.stack and len(new) != len(old))):
                raise Unsupported(f"the reshape {weight.shape} -> {eqn.params['new_sizes']} joins axes of two factors")
        place.update({axis: new if i == 0 else () for i, axis in enumerate(old)})
    one = [axis for axis in weight.stack if weight.shape[axis] == 1]
    if one:
        raise Unsupported("a reshape of a weight with one stacked layer is not served; index the layer")
    (base,) = _on_base(interp, eqn, args, weight)
    stack, inputs, outputs = (tuple(n for axis in group for n in place.get(axis, ())) for group in weight._axes())
    return [replace(weight, base=base, stack=stack, inputs=inputs, outputs=outputs)]


@rule("slice", Banked)
def slice_(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    stride = eqn.params["strides"] or (1,) * weight.ndim
    (base,) = _on_base(interp, eqn, args, weight)
    return [_cut(weight, base, lambda x, axis, to: jax.lax.slice_in_dim(x, start[axis], stop[axis], stride[axis], to))]


@rule("dynamic_slice", Banked)
def dynamic_slice(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, *starts = args
    sizes = eqn.params["slice_sizes"]
    (base,) = _on_base(interp, eqn, args, weight)
    cut = lambda x, axis, to: jax.lax.dynamic_slice_in_dim(x, starts[axis], sizes[axis], to)  # noqa: E731
    return [_cut(weight, base, cut)]


@rule("split", Banked)
def split(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    at, outs = 0, []
    for base, size in zip(_on_base(interp, eqn, args, weight), eqn.params["sizes"], strict=True):
        stop = at + int(size)

        def cut(x: jax.Array, axis: int, to: int, at: int = at, stop: int = stop) -> jax.Array:
            return jax.lax.slice_in_dim(x, at, stop, axis=to) if axis == eqn.params["axis"] else x

        outs.append(_cut(weight, base, cut))
        at = stop
    return outs


def _cut(weight: Banked, base: Any, cut: Any) -> Banked:
    """Every axis that gets shorter, cut in what has it: `cut(array, axis of the weight, axis of the array)`."""
    shape, after = weight.shape, tuple(base.shape)
    shorter = [axis for axis in range(len(shape)) if shape[axis] != after[axis]]
    out = weight
    for which in ("a", "b"):
        mine = [axis for axis in weight.features(which) if axis in shorter]
        if mine:

            def on(x: jax.Array, front: int, which: str = which, mine: list[int] = mine) -> jax.Array:
                for axis in mine:
                    x = cut(x, axis, front + weight.features(which).index(axis))
                return x

            out = out.on_features(out.base, which, on)
    for axis in shorter:
        if axis in weight.stack:
            out = out.on_stack(out.base, lambda x, axis=axis: cut(x, axis, weight.stack.index(axis)))
    return out.moved(base, lambda axis: axis)


@rule("unstack", Banked)
def unstack(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    axis, outs = eqn.params["axis"], []
    if axis not in weight.stack:
        raise Unsupported("a weight with a bank of adapters can be unstacked along a stacked axis only")
    place = {old: old - (old > axis) for old in range(weight.ndim) if old != axis}
    for i, base in enumerate(_on_base(interp, eqn, args, weight)):
        layer = weight.on_stack(base, lambda x, i=i: jax.lax.index_in_dim(x, i, weight.stack.index(axis), False))
        outs.append(_renumbered(layer, base, place))
    return outs


@rule("gather", Banked)
def gather(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Rows of an embedding: W[i] + s A[i] B, or W[:, i] through the other factor. Layers of a stack by index."""
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, indices = args
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = tuple(numbers.start_index_map)
    whole = all(
        sizes[axis] == (1 if axis in indexed else size) and (axis in numbers.collapsed_slice_dims) == (axis in indexed)
        for axis, size in enumerate(weight.shape)
    )
    which = next((w for w in ("a", "b") if weight.features(w) == indexed), None)
    if numbers.operand_batching_dims or not whole or which is None or weight.stack:
        raise Unsupported(
            "of a weight with a bank of adapters, whole rows can be looked up along the axis of one factor"
        )
    (base,) = _on_base(interp, eqn, args, weight)
    # A looked-up row is a product with a one-hot row: the first factor's column is looked up, the rest is the product.
    one_hot_free = _lookup(weight, which, indices[..., 0], eqn.params)
    offsets = tuple(numbers.offset_dims)
    lead = tuple(axis for axis in range(base.ndim) if axis not in offsets)
    order = (*lead, *offsets)
    delta = one_hot_free.reshape(*(base.shape[axis] for axis in order))
    return [densify(base) + jnp.transpose(delta, [order.index(axis) for axis in range(base.ndim)]).astype(base.dtype)]


def _lookup(weight: Banked, which: str, rows: jax.Array, params: Any) -> jax.Array:
    """scale_i * A_i[row] B_i for every index, `(*indices, features)`."""
    first, second = (weight.a, weight.b) if which == "a" else (weight.b, weight.a)
    size, whole = first.shape[-1], weight.whole
    inside = (rows >= 0) & (rows < size)
    safe = jnp.clip(rows, 0, size - 1)
    lead = whole.ids.shape[:-1]
    if rows.shape[: len(lead)] != lead and not (len(lead) == 1 and rows.shape and rows.shape[0] % lead[0] == 0):
        raise Unsupported(f"ids of shape {lead} choose an adapter for each row, and here the rows are {rows.shape}")
    groups = math.prod(lead)
    blocks, kept = safe.reshape(groups, -1), inside.reshape(groups, -1)
    out: Any = 0
    for j in range(whole.ids.shape[-1]):
        ids, weights = (z[..., j].reshape(groups) for z in (whole.ids, whole.weights))
        valid = (ids >= 0) & (ids < whole.rank.shape[0])
        slot = jnp.where(valid, ids, 0)
        position = jnp.arange(weight.max_rank, dtype=jnp.int32)
        mine = (position < whole.rank[slot][:, None]) & valid[:, None]
        at = jnp.clip(whole.start[slot][:, None] + position, 0, first.shape[0] - 1)
        scale = whole.scale[weight.at][slot] * weights.astype(whole.scale.dtype)
        h = jnp.where(mine[:, None, :] & kept[:, :, None], first[at[:, None, :], blocks[:, :, None]], 0)
        b = jnp.where(mine[:, :, None], second[at], 0)
        term = jnp.einsum("gtr,grn->gtn", (h * scale[:, None, None]).astype(weight.dtype), b.astype(weight.dtype))
        out = out + term
    return out.reshape(*rows.shape, -1)


@rule("convert_element_type", Banked)
def convert(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported(f"a cast to {eqn.params['new_dtype']} is not linear")
    return _marked(interp, eqn, args)


def _marked(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """What concerns where the weight lives, or its width: the base bears it."""
    (weight,) = args
    (base,) = _on_base(interp, eqn, args, weight)
    return [weight.moved(base, lambda axis: axis)]


for _name in ("copy", "copy_p", "sharding_constraint", "name", "mesh_cast", "reshard", "pvary"):
    rule(_name, Banked)(_marked)


@rule("stop_gradient", Banked)
def stop_gradient(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = _on_base(interp, eqn, args, weight)
    a, b = (jax.lax.stop_gradient(x) for x in (weight.a, weight.b))
    return [replace(weight, base=base, a=a, b=b)]


@rule("neg", Banked)
def negative(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = _on_base(interp, eqn, args, weight)
    return [weight.scaled(base, -1.0)]


@rule("mul", Banked)
def multiply(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A constant times the weight: it goes into the scales."""
    where = where_structured(args)
    if jnp.ndim(args[1 - where]) != 0:
        raise Unsupported("an elementwise product with an array is not served, only with a constant")
    (base,) = _on_base(interp, eqn, args, args[where])
    return [args[where].scaled(base, args[1 - where])]


@rule("div", Banked)
def divide(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    weight, other = args
    if not isinstance(weight, Banked) or jnp.ndim(other) != 0:
        raise Unsupported("a weight can be divided by a constant, nothing else")
    (base,) = _on_base(interp, eqn, args, weight)
    return [weight.scaled(base, 1.0 / jnp.asarray(other))]
