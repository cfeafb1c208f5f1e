"""Primitives that hold a jaxpr: each is built anew around the walk of its body.

A structured value crosses their boundary as the pytree it is: its arrays are operands, its shape is rebuilt inside.
It may be a constant or a scanned operand, never a carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift import compat
from lorax.lift.banked import Whole
from lorax.lift.interpreter import Interpreter, control
from lorax.lift.rules.pieces import cut
from lorax.lift.values import Pieces, Unsupported, Value


def _has_value(args: Sequence[Any]) -> bool:
    return any(isinstance(arg, Value) for arg in args)


def _no_value(args: Sequence[Any], what: str) -> None:
    if _has_value(args):
        raise Unsupported(f"a structured weight cannot be {what}")


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


@control("closed_call", "core_call", "eval_jaxpr")
def call(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    return interp.run(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), args)


@control("jit", "pjit")
def jit(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A jit inside: its name is kept; its shardings hold for the plain operands and results."""
    params = eqn.params

    def body(*inner: Any) -> list[Any]:
        return interp.run(params["jaxpr"], inner)

    args = [_constrain(arg, s) for arg, s in zip(args, params["in_shardings"], strict=True)]
    outs = jax.jit(_named(body, params["name"]))(*args)
    return [_constrain(out, s) for out, s in zip(outs, params["out_shardings"], strict=True)]


def _constrain(x: Any, sharding: Any) -> Any:
    if isinstance(x, Value) or not isinstance(sharding, jax.sharding.Sharding):
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


@control("remat2", "checkpoint")
def remat(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """jax.checkpoint with the user's policy."""
    params = eqn.params

    def body(*inner: Any) -> list[Any]:
        return interp.run(params["jaxpr"], inner)

    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(*args)


@control("while")
def while_loop(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    _no_value(init, "the carry of a while loop; close over it instead")

    def condition(carry: list[Any]) -> Any:
        return interp.run(params["cond_jaxpr"], [*cond_consts, *carry])[0]

    def body(carry: list[Any]) -> list[Any]:
        return interp.run(params["body_jaxpr"], [*body_consts, *carry])

    return jax.lax.while_loop(condition, body, init)


@control("cond")
def cond(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    index, *operands = args
    _no_value([index], "the index of a cond")

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def body(*inner: Any) -> list[Any]:
            outs = interp.run(jaxpr, inner)
            _no_value(outs, "the result of a cond")
            return outs

        return body

    return jax.lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], *operands)


@control("scan")
def scan(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """A scan over stacked layers: each step sees its own layer's factors.

    A scanned weight in pieces cuts the loop at the joints, so that each piece runs as a scan of its own: the layers
    below the first trained one then have no backward pass.
    """
    consts, carry, scanned = compat.scan_operands(eqn.params, args)
    _no_value(carry, "the carry of a scan; scan over it or close over it instead")
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    joints = sorted({joint for x in scanned if isinstance(x, Pieces) for joint in x.joints})
    bounds = [*zip([0, *joints], [*joints, length], strict=True)]
    runs: list[list[Any]] = []
    for start, stop in reversed(bounds) if reverse else bounds:
        rows = [cut(x, start, stop) for x in scanned]
        carry, ys = _scan_piece(interp, eqn, consts, carry, rows, stop - start)
        runs.append(ys)
    if reverse:
        runs.reverse()
    return [*carry, *(ys[0] if len(ys) == 1 else jnp.concatenate(ys) for ys in zip(*runs, strict=True))]


def _scan_piece(
    interp: Interpreter, eqn: Any, consts: list[Any], carry: list[Any], scanned: list[Any], length: int
) -> tuple[list[Any], list[Any]]:
    params = eqn.params
    slots = [_Slot(x, length) for x in scanned]

    def body(carry: list[Any], rows: list[list[Any]]) -> tuple[list[Any], list[Any]]:
        inner = [slot.rebuild(row) for slot, row in zip(slots, rows, strict=True)]
        outs = interp.run(params["jaxpr"], [*consts, *carry, *inner])
        _no_value(outs, "the result of a scan's body")
        return outs[: len(carry)], outs[len(carry) :]

    rows = [slot.rows for slot in slots]
    return jax.lax.scan(body, carry, rows, length=length, reverse=params["reverse"], unroll=params["unroll"])


class _Slot:
    """One scanned operand as arrays: those that have the scanned axis are rows, the others are closed over."""

    def __init__(self, x: Any, length: int):
        x = x.before_scan() if isinstance(x, Value) else x
        # What a bank keeps whole is the same in every step, whatever the length of its first axis.
        leaves, self.treedef = jax.tree_util.tree_flatten(x, is_leaf=lambda node: isinstance(node, Whole))
        self.scanned = [not isinstance(leaf, Whole) and leaf.ndim > 0 and leaf.shape[0] == length for leaf in leaves]
        self.rows = [leaf for leaf, rows in zip(leaves, self.scanned, strict=True) if rows]
        # A factor that does not vary along the scanned axis has size one there; a scalar has no such axis.
        fixed = [leaf for leaf, rows in zip(leaves, self.scanned, strict=True) if not rows]
        self.fixed = [leaf if isinstance(leaf, Whole) or not leaf.ndim else jnp.squeeze(leaf, 0) for leaf in fixed]

    def rebuild(self, rows: list[Any]) -> Any:
        """The operand of one step."""
        rows_left, fixed_left = iter(rows), iter(self.fixed)
        leaves = [next(rows_left if is_row else fixed_left) for is_row in self.scanned]
        step = jax.tree_util.tree_unflatten(self.treedef, leaves)
        return step.inside_scan() if isinstance(step, Value) else step


@control("shard_map")
def shard_map(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Per-device code: each factor is split along the weight's own mesh axes, the rank never."""
    params = eqn.params

    def body(*inner: Any) -> tuple[Any, ...]:
        outs = interp.run(params["jaxpr"], inner)
        _no_value(outs, "the result of a shard_map")
        return tuple(outs)

    args = [arg.before_shards() if isinstance(arg, Value) else arg for arg in args]
    pairs = zip(args, params["in_specs"], strict=True)
    specs = tuple(arg.specs(spec) if isinstance(arg, Value) else spec for arg, spec in pairs)
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=specs,
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*args))
