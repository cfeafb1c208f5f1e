"""A weight in, a weight out: casts, copies, constants and the marks that compilers and transformations leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift import compat
from lorax.lift.interpreter import Interpreter, control, rule, where_structured
from lorax.lift.values import Factored, Pieces, Scaled, Unsupported, Value


@rule("convert_element_type", Factored, Scaled)
def convert(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A cast of the weight casts the base. The factors keep their width and are cast where they are used."""
    (weight,) = args
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unsupported(f"a cast to {eqn.params['new_dtype']} is not linear")
    (base,) = interp.bind(eqn, [weight.base])
    return [replace(weight, base=base)]


def _on_base(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A mark that concerns where the weight lives or what it is called: the base bears it."""
    (weight,) = args
    (base,) = interp.bind(eqn, [weight.base])
    return [replace(weight, base=base)]


for _name in ("copy", "copy_p", "sharding_constraint", "name", "mesh_cast", "reshard"):
    rule(_name, Factored, Scaled)(_on_base)


def _on_all(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A linear operation without shape: the base and one factor for the value, all arrays for the mark."""
    (weight,) = args
    (base,) = interp.bind(eqn, [weight.base])
    return [weight.each(base, lambda x, extra: compat.bind(eqn, [x])[0])]


for _name in ("stop_gradient", "pvary"):
    rule(_name, Factored, Scaled)(_on_all)


@rule("neg", Factored)
def negative(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    (weight,) = args
    (base,) = interp.bind(eqn, [weight.base])
    return [replace(weight, base=base, scale=-weight.scale)]


@rule("mul", Factored)
def multiply(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A constant times the weight: it goes into the scale."""
    weight, constant = _weight_and_constant(args)
    (base,) = interp.bind(eqn, [weight.base if arg is weight else arg for arg in args])
    return [replace(weight, base=base, scale=weight.scale * _as_scale(constant, weight))]


@rule("div", Factored)
def divide(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if where_structured(args) != 0:
        raise Unsupported("a division by a structured weight is not linear")
    weight, constant = _weight_and_constant(args)
    (base,) = interp.bind(eqn, [weight.base, constant])
    return [replace(weight, base=base, scale=weight.scale / _as_scale(constant, weight))]


def _weight_and_constant(args: list[Any]) -> tuple[Factored, Any]:
    index = where_structured(args)
    weight, other = args[index], args[1 - index]
    if jnp.ndim(other) != 0:
        raise Unsupported("an elementwise product with an array is not served, only with a constant")
    return weight, other


def _as_scale(constant: Any, weight: Factored) -> jax.Array:
    return jnp.asarray(constant).astype(weight.scale.dtype)


def _scaled(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A constant times base * by: the base takes it."""
    weight = args[where_structured(args)]
    (base,) = interp.bind(eqn, [weight.base if arg is weight else arg for arg in args])
    return [replace(weight, base=base)]


for _name in ("neg", "mul", "div"):
    rule(_name, Scaled)(_scaled)


@control("optimization_barrier")
def optimization_barrier(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A barrier over several operands: every array of a structured one stands behind it."""
    leaves, treedef = jax.tree_util.tree_flatten(args)
    outs = jax.tree_util.tree_unflatten(treedef, jax.lax.optimization_barrier(leaves))
    if not all(isinstance(out, (Value, jax.Array)) for out in outs):
        raise Unsupported("a barrier over something that is no array")
    return outs


def _per_piece(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """An elementwise operation on a weight in pieces is the operation on each."""
    index = where_structured(args)
    weight = args[index]
    if any(jnp.ndim(arg) != 0 for i, arg in enumerate(args) if i != index):
        raise Unsupported("an elementwise operation with an array is not served on a weight in pieces")
    parts = [interp.bind(eqn, [*args[:index], part, *args[index + 1 :]])[0] for part in weight.parts]
    return [Pieces(tuple(parts), weight.path)]


for _name in ("convert_element_type", "copy", "copy_p", "neg", "mul", "div", "stop_gradient", "name"):
    rule(_name, Pieces)(_per_piece)
