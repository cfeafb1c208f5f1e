"""custom_jvp and custom_vjp around a structured weight: the user's own derivative rule is kept.

The rules are written for a dense weight, so they are traced for one and walked like everything else. What crosses
between the two worlds is linear and small:

    tangent    (W + s A B)' = (W' + (s A)' B) + (s A) B'    a Factored on a Factored
    cotangent  A <- s dW B^T,  B <- s A^T dW                 from the dense dW that the user's rule gives
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift import compat
from lorax.lift.contract import arrange, contract
from lorax.lift.interpreter import Interpreter, control
from lorax.lift.packed import Packed, Still
from lorax.lift.values import RANK, Factored, Unsupported, Value, abstract


def _arrays(values: Any) -> list[Any]:
    if any(isinstance(value, Value) for value in values):
        raise Unsupported("a function with a custom derivative returns the structured weight itself")
    return list(values)


def _check(args: list[Any]) -> None:
    """A dense dW tells nothing of a mask over the inputs."""
    if any(isinstance(arg, Factored) and arg.key is not None for arg in args):
        raise Unsupported("a function with a custom derivative cannot be trained through with dropout")


@control("custom_jvp_call", carries=False)
def custom_jvp(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """The primal is walked; the user's JVP rule is traced on dense shapes and walked too."""
    _check(args)
    _, jvp = compat.subfuns(eqn)

    @jax.custom_jvp
    def function(*inner: Any) -> list[Any]:
        return _arrays(interp.run(eqn.params["call_jaxpr"], inner))

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        moving = [_tangent(p, t) for p, t in zip(primals, tangents, strict=True)]
        shapes = [abstract(x) for x in (*primals, *moving)]
        outs = _arrays(interp.run(jax.make_jaxpr(jvp)(*shapes), [*primals, *moving]))
        half = len(outs) // 2
        return outs[:half], outs[half:]

    return function(*args)


def _tangent(primal: Any, tangent: Any) -> Any:
    """The tangent of a weight as a weight: product rule in the factors, one change on top of the other."""
    if not isinstance(primal, Value):
        return tangent
    if isinstance(primal, (Packed, Still)):
        return Still(jax.ShapeDtypeStruct(primal.shape, primal.dtype), primal.path)
    if not isinstance(primal, Factored):
        raise Unsupported(f"a {type(primal).__name__} cannot enter a custom_jvp")
    scale = primal.scale[..., None].astype(primal.a.dtype)
    a_moved = tangent.a * scale + primal.a * tangent.scale[..., None].astype(primal.a.dtype)
    ones = jnp.ones((1,) * primal.ndim, primal.scale.dtype)
    # Each of the two products has one moving factor, so that the whole stays linear in the tangents.
    inner = Factored(_tangent(primal.base, tangent.base), a_moved, primal.b, ones, primal.path)
    return Factored(inner, primal.a * scale, tangent.b, ones, primal.path)


@control("custom_vjp_call", carries=False)
def custom_vjp(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """The user's forward and backward rules, walked; a dense dW is passed on to base, A and B."""
    _check(args)
    _, fwd, bwd = compat.subfuns(eqn)
    n_out, n_consts = len(eqn.outvars), eqn.params["num_consts"]

    @jax.custom_vjp
    def function(*inner: Any) -> list[Any]:
        return _arrays(interp.run(eqn.params["call_jaxpr"], inner))

    def forward(*inner: Any) -> tuple[list[Any], Any]:
        # The rule takes each operand with a flag that says whether it may be differentiated.
        def with_flags(*xs: Any) -> Any:
            return fwd(*(item for i, x in enumerate(xs) for item in (x, i >= n_consts)))

        outs = interp.run(jax.make_jaxpr(with_flags)(*map(abstract, inner)), inner)
        kept, results = iter(outs[: len(outs) - n_out]), outs[len(outs) - n_out :]
        # JAX leaves out of the trace those residuals that are operands passed on.
        _, _, passed_on = eqn.params["out_trees"]()
        residuals = [next(kept) if i is None else inner[i] for i in passed_on]
        return _arrays(results), (residuals, inner)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        residuals, inner = saved

        def dense_rule(*xs: Any) -> list[Any]:
            return [_array_of(ct, x) for ct, x in zip(compat.cotangents(bwd(*xs)), inner, strict=True)]

        shapes = [abstract(x) for x in (*residuals, *cotangents)]
        cts = _arrays(interp.run(jax.make_jaxpr(dense_rule)(*shapes), [*residuals, *cotangents]))
        return tuple(_cotangent(x, ct) for x, ct in zip(inner, cts, strict=True))

    function.defvjp(forward, backward)
    return function(*args)


def _array_of(ct: Any, primal: Any) -> Any:
    """A cotangent as an array. One that the rule left out is None or an object without values, as JAX's version has it;

    one of an integer operand has no values either and is dropped again in `_cotangent`.
    """
    if isinstance(ct, jax.Array) and ct.dtype != jax.dtypes.float0:
        return ct
    return jnp.zeros(jnp.shape(primal), jnp.result_type(primal))


def _cotangent(primal: Any, dw: jax.Array) -> Any:
    """The cotangent of each array of a weight from the dense dW."""
    if not isinstance(primal, Value):
        # A Python number in the user's call is an operand without a dtype of its own.
        return dw if jnp.issubdtype(jnp.result_type(primal), jnp.inexact) else None
    if isinstance(primal, Packed):
        return None
    if not isinstance(primal, Factored):
        raise Unsupported(f"a {type(primal).__name__} cannot enter a custom_vjp")
    labels = tuple(range(primal.ndim))
    a, a_labels = primal.factor("a", labels)
    b, b_labels = primal.factor("b", labels)
    by_b, by_b_labels = _through(primal, dw, b, b_labels, labels, a_labels)
    by_a, by_a_labels = _through(primal, dw, a, a_labels, labels, b_labels)
    da = arrange(primal.scaled(by_b, by_b_labels, labels), by_b_labels, (*labels, RANK))
    db = arrange(primal.scaled(by_a, by_a_labels, labels), by_a_labels, (*labels, RANK))
    return replace(
        primal,
        base=_cotangent(primal.base, dw),
        a=da.reshape(primal.a.shape).astype(primal.a.dtype),
        b=db.reshape(primal.b.shape).astype(primal.b.dtype),
        scale=jnp.zeros_like(primal.scale),
    )


def _through(primal: Factored, dw: Any, factor: Any, factor_labels: Any, labels: Any, wanted: Any) -> Any:
    """Sum dW with one factor over the axes that the other factor does not have."""
    absent = tuple(axis for axis in labels if axis not in factor_labels and axis not in wanted)
    dw = jnp.sum(dw, axis=absent) if absent else dw
    dw_labels = tuple(axis for axis in labels if axis not in absent)
    return contract(dw, dw_labels, factor, factor_labels, frozenset(wanted))
