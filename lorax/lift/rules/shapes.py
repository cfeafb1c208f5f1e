"""A weight in, a weight out: what moves, cuts or repeats axes does the same to the base and to all that broadcasts
against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.values import Factored, Scaled, Unsupported


def _moved(function: Callable[[Any, Factored, jax.Array, int], jax.Array]) -> Callable[..., list[Any]]:
    """A rule from what happens to one factor: `function(params, weight, array, extra)`.

    `extra` is 1 where the array has the rank as an additional last axis.
    """

    def apply(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
        (weight,) = args
        (base,) = interp.bind(eqn, [weight.base])
        return [weight.each(base, lambda x, extra: function(eqn.params, weight, x, extra))]

    return apply


def _rank_axis(x: jax.Array, extra: int) -> tuple[int, ...]:
    return (x.ndim - 1,) if extra else ()


@rule("transpose", Factored, Scaled)
@_moved
def transpose(params: Any, weight: Factored, x: jax.Array, extra: int) -> jax.Array:
    return jnp.transpose(x, (*params["permutation"], *_rank_axis(x, extra)))


@rule("squeeze", Factored, Scaled)
@_moved
def squeeze(params: Any, weight: Factored, x: jax.Array, extra: int) -> jax.Array:
    return jax.lax.squeeze(x, params["dimensions"])


@rule("broadcast_in_dim", Factored, Scaled)
@_moved
def broadcast_in_dim(params: Any, weight: Factored, x: jax.Array, extra: int) -> jax.Array:
    """New axes have size one in a factor: it does not depend on them."""
    dims, ndim = params["broadcast_dimensions"], len(params["shape"])
    shape = [1] * ndim
    for old, new in enumerate(dims):
        shape[new] = x.shape[old]
    return x.reshape(*shape, *(x.shape[-1:] if extra else ()))


@rule("slice", Factored, Scaled)
@_moved
def slice_(params: Any, weight: Factored, x: jax.Array, extra: int) -> jax.Array:
    strides = params["strides"] or (1,) * weight.ndim
    start, limit, stride = [], [], []
    for axis, size in enumerate(weight.shape):
        full = x.shape[axis] == size
        start.append(params["start_indices"][axis] if full else 0)
        limit.append(params["limit_indices"][axis] if full else 1)
        stride.append(strides[axis] if full else 1)
    tail = (x.shape[-1],) if extra else ()
    return jax.lax.slice(x, (*start, *[0] * extra), (*limit, *tail), (*stride, *[1] * extra))


@rule("rev", Factored, Scaled)
@_moved
def reverse(params: Any, weight: Factored, x: jax.Array, extra: int) -> jax.Array:
    return jax.lax.rev(x, params["dimensions"])  # along an axis of size one it changes nothing


@rule("dynamic_slice", Factored, Scaled)
def dynamic_slice(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, *starts = args
    (base,) = interp.bind(eqn, [weight.base, *starts])
    sizes = eqn.params["slice_sizes"]

    def cut(x: jax.Array, extra: int) -> jax.Array:
        # A factor is cut along the axes it depends on, one by one; the others have nothing to cut.
        for axis, size in enumerate(weight.shape):
            if x.shape[axis] == size and sizes[axis] != size:
                # In range already, as the base's own slice is: a negative start would count from the end once more.
                start = jnp.clip(starts[axis], 0, size - sizes[axis])
                x = jax.lax.dynamic_slice_in_dim(x, start, sizes[axis], axis)
        return x

    return [weight.each(base, cut)]


@rule("split", Factored, Scaled)
def split(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    bases = interp.bind(eqn, [weight.base])
    outs, start = [], 0
    for base, size in zip(bases, sizes, strict=True):
        outs.append(weight.each(base, _cut_at(weight, axis, start, int(size))))
        start += int(size)
    return outs


@rule("unstack", Factored, Scaled)
def unstack(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    axis = eqn.params["axis"]
    outs = []
    for index, base in enumerate(interp.bind(eqn, [weight.base])):
        cut = _cut_at(weight, axis, index, 1)
        outs.append(weight.each(base, lambda x, extra, cut=cut: jnp.squeeze(cut(x, extra), axis)))
    return outs


def _cut_at(weight: Factored, axis: int, start: int, size: int) -> Callable[[jax.Array, int], jax.Array]:
    def cut(x: jax.Array, extra: int) -> jax.Array:
        full = x.shape[axis] == weight.shape[axis]
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis) if full else x

    return cut


@rule("reshape", Factored, Scaled)
def reshape(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    if eqn.params["dimensions"] is not None:
        raise Unsupported("a reshape that also permutes is not served")
    groups = axis_groups(weight.shape, tuple(eqn.params["new_sizes"]))

    def refit(x: jax.Array, extra: int) -> jax.Array:
        shape: list[int] = []
        for old, new in groups:
            have, want = [x.shape[axis] for axis in old], [weight.shape[axis] for axis in old]
            if have == want:
                shape += new
            elif all(size == 1 for size in have):
                shape += [1] * len(new)
            else:
                raise Unsupported(f"the reshape {weight.shape} -> {eqn.params['new_sizes']} joins axes of A and B")
        return x.reshape(*shape, *(x.shape[-1:] if extra else ()))

    # The factors first: a reshape that they cannot follow is refused before anything is computed.
    refitted = weight.each(weight.base, refit)
    (base,) = interp.bind(eqn, [weight.base])
    return [replace(refitted, base=base)]


def axis_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Cut a reshape into independent ones: (axes of the old shape, sizes of the new shape) with equal products.

    Example:
        >>> axis_groups((6, 4, 5), (6, 2, 2, 5))
        [([0], [6]), ([1], [2, 2]), ([2], [5])]
    """
    if math.prod(old) != math.prod(new):
        raise Unsupported(f"a reshape from {old} to {new} changes the size")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        axes, sizes = ([i], [new[j]]) if i < len(old) and j < len(new) else ([], [])
        if not axes:
            # Trailing ones on either side have no partner: they join the last group.
            axes, sizes = list(range(i, len(old))), list(new[j:])
            i, j = len(old), len(new)
            if groups and groups[-1]:
                groups[-1][0].extend(axes)
                groups[-1][1].extend(sizes)
                break
            groups.append((axes, sizes))
            break
        i, j = i + 1, j + 1
        left, right = old[axes[0]], sizes[0]
        while left != right:
            if left < right:
                left *= old[i]
                axes.append(i)
                i += 1
            else:
                right *= new[j]
                sizes.append(new[j])
                j += 1
        groups.append((axes, sizes))
    return groups
