"""What a function feeds into its weights: the sum of x x^T over all inputs x of each.

The sum comes out of the backward pass. At every product x W of a watched weight, x goes through an identity whose
derivative with respect to a matrix of zeros is x^T x, whatever arrives from above. So scan stacks it by layer, and
repeated uses add up, by the rules that gradients have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorax.errors import LoraxError
from lorax.lift.api import evaluate, is_array
from lorax.lift.contract import arrange, contract
from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.opening import open_leaf
from lorax.lift.rules.products import dot_labels
from lorax.lift.values import Value, densify
from lorax.paths import path_of
from lorax.weights import Axes, is_structured


@dataclass(frozen=True, eq=False)
class Watched(Value):
    """A weight whose inputs are summed up: `moment` is `(*stack, in, in)` zeros that the derivative is taken by."""

    base: Any
    moment: jax.Array
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def inside_scan(self) -> Watched:
        def less(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - 1 for axis in axes if axis)

        return replace(self, stack=less(self.stack), inputs=less(self.inputs))

    def dense(self) -> jax.Array:
        return densify(self.base)


jax.tree_util.register_dataclass(Watched, data_fields=["base", "moment"], meta_fields=["stack", "inputs", "path"])


@rule("dot_general", Watched)
def dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """x goes through the tap, where the product sums the weight's inputs; the rest is the user's own equation."""
    side = where_structured(args)
    weight, x = args[side], args[1 - side]
    summed, batched = eqn.params["dimension_numbers"]
    if set(summed[side]) == set(weight.inputs):
        _, labels, _ = dot_labels(weight.ndim, x.ndim, summed, batched, side)
        x = _tap(weight, labels)(x, weight.moment)
    return interp.bind(eqn, [weight.base, x] if side == 0 else [x, weight.base])


def _tap(weight: Watched, labels: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    @jax.custom_vjp
    def tap(x: jax.Array, moment: jax.Array) -> jax.Array:
        return x

    def backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cotangent, _moment(weight, x.astype(jnp.float32), labels)

    tap.defvjp(lambda x, moment: (x, x), backward)
    return tap


def _moment(weight: Watched, x: jax.Array, labels: Any) -> jax.Array:
    """Sum of x x^T over everything but the weight's own axes."""
    again = tuple(("again", label) if label in weight.inputs else label for label in labels)
    rows, columns = weight.inputs, tuple(("again", axis) for axis in weight.inputs)
    out, out_labels = contract(
        x, labels, x, again, frozenset((*weight.stack, *rows, *columns)), jax.lax.Precision.HIGHEST
    )
    out = arrange(out, out_labels, (*weight.stack, *rows, *columns))
    size = math.prod(weight.shape[axis] for axis in rows)
    stack = out.shape[: len(weight.stack)]
    return jnp.broadcast_to(out.reshape(*stack, size, size), weight.moment.shape)


@rule("convert_element_type", Watched)
def convert(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = interp.bind(eqn, [weight.base])
    return [replace(weight, base=base)]


def second_moments(
    fn: Callable[..., Any], params: Any, args: Sequence[Any], axes: Mapping[str, Axes]
) -> dict[str, Float[Array, "*stack in in"]]:
    """Sum of x x^T over the inputs of each weight in one call `fn(params, *args)`.

    Args:
        fn: the function; it is run once, with its backward pass.
        params: the tree, concrete.
        args: the other arguments, concrete.
        axes: path -> the roles of the weight's axes, for the weights that are watched.

    Returns:
        path -> `(*stack, in, in)`, float32.

    Raises:
        LoraxError: a weight that no product with its inputs reaches.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path((tuple([params, *args]), {}), is_leaf=is_structured)
    leaves = [leaf for _, leaf in keyed]
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    count = len(jax.tree_util.tree_leaves(params, is_leaf=is_structured))
    paths = {i: path_of(keyed[i][0][2:]) for i in traced if i < count}
    zeros = {path: _zeros(leaves[i], axes[path]) for i, path in paths.items() if path in axes}

    def total(moments: dict[str, jax.Array], arrays: list[Any]) -> jax.Array:
        filled = dict(zip(traced, arrays, strict=True))
        values = []
        for i in traced:
            path = paths.get(i, "")
            value = open_leaf(filled[i], path)
            if path in moments:
                value = Watched(value, moments[path], axes[path].stack, axes[path].inputs, path)
            values.append(value)
        outs = evaluate(Interpreter(materialize=True), fn, treedef, leaves, traced, values, returns_values=True)
        floats = [out for out in jax.tree.leaves(outs) if jnp.issubdtype(out.dtype, jnp.floating)]
        return sum((jnp.sum(out.astype(jnp.float32)) for out in floats), start=jnp.zeros(()))

    found = jax.jit(jax.grad(total))(zeros, [leaves[i] for i in traced])
    for path, moment in found.items():
        if not bool(jnp.any(moment)):
            raise LoraxError(f"{path}: no product of the example brings inputs to it, so they cannot be read")
    return found


def _zeros(leaf: Any, axes: Axes) -> jax.Array:
    stack = tuple(leaf.shape[axis] for axis in axes.stack)
    size = math.prod(leaf.shape[axis] for axis in axes.inputs)
    return jnp.zeros((*stack, size, size), jnp.float32)
