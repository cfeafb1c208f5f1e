"""A dot_general over a quantised weight as a product of rows with a matrix, which is what kernels compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax.lift.interpreter import where_structured
from lorax.lift.packed import Packed
from lorax_kernels import nf4_matmul
from lorax_kernels.nf4 import QuantizedArray


@dataclass(frozen=True)
class Product:
    """x @ W (or x @ W^T, where the rows of the stored matrix are summed), and how its result is laid out.

    matrix: the weight as (n, k): outputs x inputs.
    rows: x with the summed axes merged into one, the last.
    shape: of the result before it is moved: (*free axes of x, *free axes of the weight).
    weight_first: the weight is the left operand, so its axes come first in the result.
    inner, outer: the weight's summed and free axes, as they are stored.
    options: precision and dtype that the user asked for.
    """

    weight: Packed
    matrix: QuantizedArray
    rows: jax.Array
    transpose: bool
    shape: tuple[int, ...]
    weight_first: bool
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    options: dict[str, Any]

    def run(self) -> jax.Array:
        """The product, in the layout that dot_general gives."""
        y = nf4_matmul.matmul(
            self.rows,
            self.matrix,
            self.transpose,
            self.weight.marked_with if self.weight.marks else None,
            self.weight.extras,
            **self.options,
        )
        return self.arrange(y)

    def arrange(self, y: jax.Array) -> jax.Array:
        """(*rows, columns) as dot_general lays it out."""
        y = y.reshape(self.shape)
        free = self.rows.ndim - 1
        return jnp.moveaxis(y, range(free), range(y.ndim - free, y.ndim)) if self.weight_first else y


def as_product(eqn: Any, args: list[Any]) -> Product | None:
    """The product of a dot_general equation, or None where it is of another form.

    The summed axes must be all those that are stored last (x W) or first (x W^T), in their order, and the others must
    lie in the weight's order; the codes must keep the weight's axes.
    """
    side = where_structured(args)
    weight, x = args[side], args[1 - side]
    (summed, batched), array = eqn.params["dimension_numbers"], weight.array
    if weight.views or batched[0] or array.stack or not array.is_regular or array.values_per_code == 1:
        return None
    if eqn.params.get("out_sharding") is not None or x.dtype != weight.dtype or weight.ndim < 2:
        return None
    w_summed, x_summed = tuple(summed[side]), tuple(summed[1 - side])
    pairs = dict(zip(w_summed, x_summed, strict=True))
    count = len(w_summed)
    forms = (
        (False, weight.order[-count:], weight.order[:-count]),
        (True, weight.order[:count], weight.order[count:]),
    )
    found = [form for form in forms if set(form[1]) == set(w_summed) and form[2] and list(form[2]) == sorted(form[2])]
    if not found:
        return None
    transpose, inner, outer = found[0]
    cut, sizes = (count if transpose else weight.ndim - count), array.slice_shape
    free = [axis for axis in range(x.ndim) if axis not in x_summed]
    rows = jnp.transpose(x, (*free, *(pairs[axis] for axis in inner)))
    rows = rows.reshape(*rows.shape[: len(free)], -1)
    n, k = math.prod(sizes[:cut]), math.prod(sizes[cut:])
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    outs = tuple(weight.shape[axis] for axis in outer)
    shape = (*rows.shape[:-1], *outs)
    return Product(weight, as_matrix(array, n, k), rows, transpose, shape, side == 0, inner, outer, options)


def fused_product(eqn: Any, args: list[Any]) -> jax.Array | None:
    """x W + s (x A) B in one kernel, where the base is quantised and a kernel serves it; None elsewhere."""
    side = where_structured(args)
    weight = args[side]
    if not isinstance(weight.base, Packed) or weight.key is not None:
        return None
    product = as_product(eqn, [weight.base if i == side else arg for i, arg in enumerate(args)])
    if product is None or product.transpose or weight.base.marks:
        return None
    n, k = product.matrix.slice_shape
    rank = weight.a.shape[-1]
    # A must belong to the summed axes, B to the others, and the scale be one number.
    if weight.a.size != k * rank or weight.b.size != n * rank or weight.scale.size != 1:
        return None
    if not all(weight.in_a(axis) for axis in product.inner) or not all(weight.in_b(axis) for axis in product.outer):
        return None
    if nf4_matmul.serves(product.rows, product.matrix, False, False, rank, product.options) == "xla":
        return None
    a = weight.factor("a", tuple(range(weight.ndim)))[0]
    b = weight.factor("b", tuple(range(weight.ndim)))[0]
    a = jnp.transpose(a, (*(sorted(product.inner).index(axis) for axis in product.inner), a.ndim - 1)).reshape(k, rank)
    b = b.reshape(n, rank).T
    return product.arrange(nf4_matmul.lora_matmul(product.rows, product.matrix, a, b, weight.scale.reshape(())))


def as_matrix(array: QuantizedArray, n: int, k: int) -> QuantizedArray:
    """The same blocks as an (n, k) array: the order of the codes does not change."""
    assert array.scales is not None
    if array.core_ndim == 2:
        return array
    place = array.placement
    if place is not None:
        sizes = array.slice_shape
        place = place.as_matrix(next(cut for cut in range(1, len(sizes)) if math.prod(sizes[:cut]) == n))
    codes, scales = array.codes.reshape(n, -1), array.scales.reshape(n, -1)
    return replace(array, codes=codes, scales=scales, core_ndim=2, placement=place)
