"""Where a weight is used up: x @ (W + s A B) = x @ W + s (x @ A) @ B, for every product that JAX has.

The base takes the very equation that the user wrote. The change goes through the factor whose axes the product
sums first, then through the other, so that nothing of the weight's own size is built.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.contract import arrange, contract
from lorax.lift.interpreter import Interpreter, rule, where_structured
from lorax.lift.packed_product import fused_product
from lorax.lift.values import RANK, Factored, Unsupported, cast

CONTRADICTION = (
    "its factors were shaped for another use ({what}); "
    "pass fn and args to adapt, so that the axes are read from the trace"
)


def _contradiction(what: str) -> Unsupported:
    return Unsupported(CONTRADICTION.format(what=what))


@rule("dot_general", Factored)
def dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Any contracting and batch dimensions, the weight on either side."""
    fused = fused_product(eqn, args)
    if fused is not None:
        return [fused]
    (out,) = interp.bind(eqn, _with_base(args))
    side = where_structured(args)
    weight, x = args[side], args[1 - side]
    summed, batched = eqn.params["dimension_numbers"]
    w_labels, x_labels, out_labels = dot_labels(weight.ndim, x.ndim, summed, batched, side)
    delta = low_rank_product(x, x_labels, weight, w_labels, out_labels, eqn.params["precision"], weight_first=side == 0)
    return [jax.lax.add(out, cast(delta, out.dtype))]


def dot_labels(w_ndim: int, x_ndim: int, summed: Any, batched: Any, side: int) -> tuple[Any, Any, Any]:
    """Labels of the weight (its axis numbers), of x (shared ones, else its own) and of the output in order."""
    w_axes, x_axes = summed[side] + batched[side], summed[1 - side] + batched[1 - side]
    w_labels = tuple(range(w_ndim))
    shared = dict(zip(x_axes, w_axes, strict=True))
    x_labels = tuple(shared.get(axis, ("x", axis)) for axis in range(x_ndim))
    w_rest = tuple(axis for axis in w_labels if axis not in w_axes)
    x_rest = tuple(label for label in x_labels if isinstance(label, tuple))
    rest = (*w_rest, *x_rest) if side == 0 else (*x_rest, *w_rest)
    return w_labels, x_labels, (*batched[side], *rest)


def low_rank_product(
    x: jax.Array,
    x_labels: Any,
    weight: Factored,
    w_labels: Any,
    out_labels: Any,
    precision: Any,
    weight_first: bool = False,
) -> jax.Array:
    """scale * (x . first) . second over labelled axes, `first` being the factor that the product sums.

    x has the labels it shares with the weight and its own; the result has `out_labels`, in order.
    Raises Unsupported when the sum runs over axes of both factors, or over a stacked one.
    """
    keep = frozenset(out_labels)
    first, second = _order(weight, [axis for axis in w_labels if axis not in keep])
    h_factor, h_factor_labels = weight.factor(first, w_labels)
    y_factor, y_factor_labels = weight.factor(second, w_labels)
    x, x_labels = _sum_absent(weight.dropped(x), x_labels, (*h_factor_labels, *y_factor_labels), keep)
    h, h_labels = contract(x, x_labels, h_factor, h_factor_labels, keep | {RANK}, precision, _accumulator(x.dtype))
    h = cast(weight.scaled(h, h_labels, w_labels), weight.dtype)
    if weight_first:
        y, y_labels = contract(y_factor, y_factor_labels, h, h_labels, keep, precision)
    else:
        y, y_labels = contract(h, h_labels, y_factor, y_factor_labels, keep, precision)
    return arrange(y, y_labels, out_labels)


def _order(weight: Factored, summed: list[int]) -> tuple[str, str]:
    """Which factor a product meets first: the one that has the summed axes."""
    stacked = [axis for axis in summed if weight.is_stacked(axis)]
    if stacked:
        raise _contradiction(f"axis {stacked[0]} of {weight.shape} is stacked, and here it is summed")
    # A sum over an axis of size one is none, whichever factor has it.
    long = [axis for axis in summed if weight.shape[axis] != 1]
    in_a = any(weight.in_a(axis) for axis in long)
    in_b = any(weight.in_b(axis) for axis in long)
    if in_a and in_b:
        raise _contradiction(f"axes {tuple(summed)} of {weight.shape} are split between A and B")
    return ("b", "a") if in_b else ("a", "b")


def _sum_absent(x: jax.Array, x_labels: Any, present: Any, keep: Any) -> tuple[jax.Array, Any]:
    """Sum x over a shared axis that neither factor has: the weight was broadcast along it."""
    absent = tuple(i for i, label in enumerate(x_labels) if label not in present and label not in keep)
    if absent:
        x = jnp.sum(x, axis=absent)
    return x, tuple(label for i, label in enumerate(x_labels) if i not in absent)


def _accumulator(dtype: Any) -> Any:
    """16-bit activations meet the first factor with a float32 sum: rounding it would cost the change's low bits."""
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else None


@rule("ragged_dot_general", Factored)
def ragged_dot(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """Rows in groups, each group with its own expert: (rows, k) x (experts, k, n)."""
    if where_structured(args) != 1:
        raise Unsupported("the weight must be the right-hand side of a ragged dot")
    (out,) = interp.bind(eqn, _with_base(args))
    x, weight, groups = args
    group_axis, k_axis, n_axis = _ragged_axes(eqn.params["ragged_dot_dimension_numbers"], x, weight)
    in_place = weight.in_a(k_axis) and not weight.in_b(k_axis), weight.in_a(n_axis) and weight.shape[n_axis] != 1
    if weight.in_b(k_axis) and not weight.in_a(k_axis):
        first, second = weight.b, weight.a
    elif in_place == (True, False):
        first, second = weight.a, weight.b
    else:
        raise _contradiction(f"axes {k_axis} and {n_axis} of {weight.shape} are not one A's and the other B's")
    experts, k, n = (weight.shape[axis] for axis in (group_axis, k_axis, n_axis))
    rank = first.shape[-1]
    first = jnp.transpose(first, (group_axis, k_axis, n_axis, 3)).reshape(-1, k, rank)
    second = jnp.transpose(second, (group_axis, 3, n_axis, k_axis)).reshape(-1, rank, n)
    scale = jnp.transpose(weight.scale, (group_axis, k_axis, n_axis))
    first = jnp.broadcast_to(first, (experts, k, rank)).astype(weight.dtype)
    second = jnp.broadcast_to(second * scale, (experts, rank, n)).astype(weight.dtype)
    precision = eqn.params["precision"]
    h = jax.lax.ragged_dot(weight.dropped(x), first, groups, precision=precision)
    return [out + jax.lax.ragged_dot(h, second, groups, precision=precision).astype(out.dtype)]


def _ragged_axes(numbers: Any, x: jax.Array, weight: Factored) -> tuple[int, int, int]:
    """The weight's axes of groups, of what is summed, and the other: of (rows, k) times groups of (k, n), any order."""
    ((x_sum, w_sum), (x_batch, _)) = numbers.dot_dimension_numbers
    group_axes = tuple(numbers.rhs_group_dimensions)
    plain = tuple(x_sum) == (1,) and x.ndim == 2 and not x_batch and len(group_axes) == 1 and weight.ndim == 3
    if not plain:
        raise Unsupported("only the form (rows, k) x groups of (k, n) of a ragged dot is served")
    return group_axes[0], w_sum[0], 3 - group_axes[0] - w_sum[0]


@rule("conv_general_dilated", Factored)
def convolution(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    """conv(x, A) has `rank` channels; B is a 1x1 convolution after it. Feature groups share A."""
    if where_structured(args) != 1:
        raise Unsupported("the weight must be the kernel of a convolution")
    if eqn.params["batch_group_count"] != 1:
        raise Unsupported("a convolution with batch_group_count is not served")
    (out,) = interp.bind(eqn, _with_base(args))
    x, weight = args
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis = numbers.rhs_spec[0]
    _check_kernel(weight, out_axis)
    # A: the rank takes the place of the output channels, once per feature group.
    a = jnp.moveaxis(jnp.squeeze(weight.a, out_axis), -1, out_axis).astype(weight.dtype)
    a = jnp.concatenate([a] * groups, axis=out_axis) if groups > 1 else a
    params = {k: v for k, v in eqn.params.items() if k not in ("out_sharding", "preferred_element_type")}
    h = jax.lax.conv_general_dilated(weight.dropped(x), a, **_conv_params(params))
    # B: a 1x1 kernel, the rank in the place of the input channels.
    in_axis = numbers.rhs_spec[1]
    b = jnp.moveaxis(weight.b * weight.scale[..., None], -1, in_axis)
    b = jnp.squeeze(b, in_axis + 1).astype(weight.dtype)
    spatial = len(numbers.rhs_spec) - 2
    y = jax.lax.conv_general_dilated(
        h,
        b,
        window_strides=(1,) * spatial,
        padding=((0, 0),) * spatial,
        dimension_numbers=jax.lax.ConvDimensionNumbers(numbers.out_spec, numbers.rhs_spec, numbers.out_spec),
        feature_group_count=groups,
        precision=eqn.params["precision"],
    )
    return [out + y.astype(out.dtype)]


def _check_kernel(weight: Factored, out_axis: int) -> None:
    others = [axis for axis in range(weight.ndim) if axis != out_axis]
    if (weight.in_a(out_axis) and weight.shape[out_axis] != 1) or any(weight.in_b(axis) for axis in others):
        raise _contradiction(f"A must have every axis of the kernel {weight.shape} but {out_axis}, B that one")


def _conv_params(params: dict[str, Any]) -> dict[str, Any]:
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    return {name: params[name] for name in (*names, "feature_group_count", "precision")}


def _with_base(args: list[Any]) -> list[Any]:
    """The operands with the base in the structured weight's place."""
    return [arg.base if isinstance(arg, Factored) else arg for arg in args]
