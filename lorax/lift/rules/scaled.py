"""A weight times the lengths of its columns: x (V * m) = (x V) * m, and (x * m) V^T where the columns are summed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.contract import arrange
from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.rules.lookups import check_whole_rows, gather_factor
from lorax.lift.rules.products import dot_labels
from lorax.lift.values import Scaled, Unsupported, Value


@rule("dot_general", Scaled)
def dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """The lengths multiply what comes out, or what goes in where the product sums their axes."""
    side = where_structured(args)
    weight, x = args[side], args[1 - side]
    summed, batched = eqn.params["dimension_numbers"]
    w_labels, x_labels, out_labels = dot_labels(weight.ndim, x.ndim, summed, batched, side)
    has = [axis for axis in range(weight.ndim) if weight.by.shape[axis] != 1]
    before = any(axis not in out_labels for axis in has)
    if before:
        x = _times(x, x_labels, weight, w_labels, has)
    operands = [weight.base, x] if side == 0 else [x, weight.base]
    (out,) = interp.bind(eqn, operands)
    return [out if before else _times(out, out_labels, weight, w_labels, has)]


def _times(x: jax.Array, labels: Any, weight: Scaled, w_labels: Any, has: list[int]) -> jax.Array:
    """x times the lengths, by label; in float32, so that 16-bit activations are rounded once."""
    if not set(has) <= set(labels):
        raise Unsupported(
            f"it has lengths along axes {tuple(has)} of {weight.shape}, and here some are summed, others not"
        )
    gone = tuple(axis for axis in w_labels if axis not in has)
    by = arrange(jax.lax.squeeze(weight.by, gone), has, labels)
    wide = jnp.float32 if x.dtype in (jnp.bfloat16, jnp.float16) else x.dtype
    return (x.astype(wide) * by.astype(wide)).astype(x.dtype)


@rule("gather", Scaled)
def gather(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Rows of the weight times the lengths, or times their own length."""
    if where_structured(args) != 0:
        raise Unsupported("a structured weight cannot be an index")
    weight, indices = args
    check_whole_rows(weight, eqn.params["dimension_numbers"], eqn.params["slice_sizes"])
    (rows,) = interp.bind(eqn, [weight.base, indices])
    by = gather_factor(weight, weight.by, indices, eqn.params, 0)
    if isinstance(rows, Value):
        return [replace(weight, base=rows, by=by)]
    wide = jnp.float32 if rows.dtype in (jnp.bfloat16, jnp.float16) else rows.dtype
    return [(rows.astype(wide) * by.astype(wide)).astype(rows.dtype)]


@rule("conv_general_dilated", Scaled)
def convolution(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Output channels times their lengths."""
    if where_structured(args) != 1:
        raise Unsupported("the weight must be the kernel of a convolution")
    x, weight = args
    numbers = eqn.params["dimension_numbers"]
    out_axis, channel = numbers.rhs_spec[0], numbers.out_spec[1]
    if weight.by.size != weight.shape[out_axis] or weight.by.shape[out_axis] != weight.shape[out_axis]:
        raise Unsupported("its lengths are not those of the output channels")
    (out,) = interp.bind(eqn, [x, weight.base])
    by = weight.by.reshape([-1 if axis == channel else 1 for axis in range(out.ndim)])
    return [(out * by.astype(out.dtype)).astype(out.dtype)]
