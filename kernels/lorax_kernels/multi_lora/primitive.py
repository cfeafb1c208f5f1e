"""The two operations as JAX primitives: batching, derivatives and lowering, once for all backends.

    apply(y, x, a, b, w)     y[g] + w[g] * sum over p of group g of (x[g] . a[p]) b[p]         (g, t, n)
    grad(x, dy, b, w)        g[p] = sum over groups that own p of w * sum_t (dy . b[p]) x      (total, k)

Both are linear in each of their floating operands, and each transpose is one of the two again:

    apply by y: ct          by x: apply(ct, b, a)     by a: grad(x, ct, b)     by b: grad(ct, x, a)
    grad  by x: apply(dy, b, G)     by dy: apply(x, G, b)     by b: grad(dy, x, G)        (G the cotangent, (total, k))

A primitive, and not custom_vjp with custom_vmap: there, the gradient of a factor that the mapped examples share would
be made per example and summed afterwards, a copy of the bank for every example; and one that sums inside would be wrong
for `vmap` of `grad`. A primitive is batched before it is transposed, so both are right and nothing is made twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lorax_kernels.dispatch import Shapes, explain
from lorax_kernels.multi_lora.reference import sum_dtype

APPLY, GRAD = "multi_lora", "multi_lora_grad"
# Rows of the table that no compiler takes apart.
KERNELS = ("pallas", "triton")


@dataclass(frozen=True)
class Options:
    """What is static: the bound on ranks, the dtype of the result, the precision, whether y is there, the backend.

    total: rows of the result of `grad`.
    """

    max_rank: int
    dtype: Any
    precision: Any = None
    adds: bool = False
    total: int = 0
    backend: str = ""


def apply(
    y: Any, x: Any, a: Any, b: Any, a_start: Any, b_start: Any, rank: Any, weight: Any, options: Options
) -> jax.Array:
    """Choose a backend and bind; y may be None."""
    groups, rows, k = x.shape
    chosen = _choose(APPLY, groups, rows, k, b.shape[1], a.shape[0], x.dtype, options)
    operands = (*(() if y is None else (y,)), x, a, b, a_start, b_start, rank, weight)
    options = replace(options, adds=y is not None, total=0, backend=chosen)
    return apply_p.bind(*_alike(operands), options=options)


def grad(
    x: Any, dy: Any, b: Any, b_start: Any, out_start: Any, rank: Any, weight: Any, total: int, options: Options
) -> jax.Array:
    """Choose a backend and bind."""
    groups, rows, k = x.shape
    chosen = _choose(GRAD, groups, rows, k, dy.shape[2], total, x.dtype, options)
    options = replace(options, adds=False, total=total, backend=chosen)
    return grad_p.bind(*_alike((x, dy, b, b_start, out_start, rank, weight)), options=options)


def _choose(op: str, groups: int, rows: int, k: int, n: int, total: int, dtype: Any, options: Options) -> str:
    return explain(op, _shapes(groups, rows, k, n, total, dtype, options)).chosen


def _shapes(
    groups: int, rows: int, k: int, n: int, total: int, dtype: Any, options: Options, split: bool = False
) -> Shapes:
    name = str(jnp.dtype(dtype))
    return Shapes(groups * rows, k, n, name, rank=options.max_rank, groups=groups, total=total, split=split)


def _rechosen(op: str, avals: Any, options: Options) -> Options:
    """The choice where the compiler splits the program over devices, which is known only now."""
    if op == APPLY:
        x, a, b = avals[1:4] if options.adds else avals[:3]
        k, n, total = x.shape[2], b.shape[1], a.shape[0]
    else:
        x, dy = avals[:2]
        k, n, total = x.shape[2], dy.shape[2], options.total
    groups, rows = x.shape[:2]
    shapes = _shapes(groups, rows, k, n, total, x.dtype, options, split=True)
    return replace(options, backend=explain(op, shapes).chosen)


def _alike(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside shard_map, operands that vary over the same mesh axes: the cast's transpose is the sum over devices."""
    varying = [jax.typeof(x).mat.varying for x in operands]
    axes = frozenset().union(*varying)
    missing = [tuple(sorted(axes - mine)) for mine in varying]
    cast = lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x  # noqa: E731
    return tuple(map(cast, operands, missing))


def _run_apply(*operands: jax.Array, options: Options) -> jax.Array:
    y, rest = (operands[0], operands[1:]) if options.adds else (None, operands)
    return _backend(options.backend).apply(y, *rest, options=options)


def _run_grad(*operands: jax.Array, options: Options) -> jax.Array:
    return _backend(options.backend).grad(*operands, options=options)


def _backend(name: str) -> Any:
    """The module or object that implements a row of the table: `apply(y, ...)` and `grad(...)`."""
    from lorax_kernels.multi_lora import implementations

    return implementations.named(name)


apply_p, grad_p = Primitive("multi_lora"), Primitive("multi_lora_grad")


@functools.cache
def _jitted(run: Any) -> Any:
    return jax.jit(run, static_argnames="options")


def _define(primitive: Primitive, op: str, run: Any, shape: Any) -> None:
    # Compiled, and so lowered by the rule below.
    primitive.def_impl(lambda *operands, options: _jitted(primitive.bind)(*operands, options=options))
    primitive.def_abstract_eval(shape)
    lower = mlir.lower_fun(run, multiple_results=False)

    def rule(ctx: Any, *operands: Any, options: Options) -> Any:
        # What varies over which mesh axis has been settled: a backend sees one device's arrays.
        plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        if options.backend in KERNELS and _is_split(ctx.module_context.axis_context):
            options = _rechosen(op, plain, options)
        return lower(ctx.replace(avals_in=plain), *operands, options=options)

    mlir.register_lowering(primitive, rule)


def _is_split(context: Any) -> bool:
    """Whether the compiler splits what is lowered over devices. Under a `shard_map` over all axes it does not."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) not in (1, None)
    manual = frozenset(context.manual_axes) | frozenset(mesh.manual_axes)
    return mesh.size > 1 and manual != frozenset(mesh.axis_names)


def _apply_shape(*avals: Any, options: Options) -> Any:
    x, _, b = avals[1:4] if options.adds else avals[:3]
    return x.update(shape=(*x.shape[:2], b.shape[1]), dtype=options.dtype, weak_type=False)


def _grad_shape(x: Any, dy: Any, b: Any, *_: Any, options: Options) -> Any:
    return b.update(shape=(options.total, x.shape[2]), dtype=options.dtype, weak_type=False)


_define(apply_p, APPLY, _run_apply, _apply_shape)
_define(grad_p, GRAD, _run_grad, _grad_shape)


# Batching. What is mapped becomes groups; mapped factors lie one after the other along the total rank.


def _front(x: Any, dim: Any, size: int) -> jax.Array:
    return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def _merged(x: Any, dim: Any, size: int) -> jax.Array:
    """A mapped operand with its groups (or rows of factors) of all examples along one axis."""
    x = _front(x, dim, size)
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _starts(start: Any, dim: Any, size: int, step: int) -> jax.Array:
    """Merged starts; `step` rows from one example's factor to the next one's, 0 for a shared factor."""
    start = _front(start, dim, size)
    return (start + jnp.arange(size, dtype=start.dtype)[:, None] * step).reshape(-1)


def _batch_apply(operands: Any, dims: Any, *, options: Options) -> Any:
    y, x, a, b, *route = operands if options.adds else (None, *operands)
    y_dim, x_dim, a_dim, b_dim, *route_dims = dims if options.adds else (None, *dims)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    if a_dim is None and b_dim is None and all(d is None for d in route_dims):
        # One adapter for all: more rows in each group.
        x = jnp.moveaxis(_front(x, x_dim, size), 0, 1)
        shape = x.shape
        flat = lambda z: z.reshape(shape[0], size * shape[2], -1)  # noqa: E731
        y = None if y is None else flat(jnp.moveaxis(_front(y, y_dim, size), 0, 1))
        out = _rebind(apply_p, options, (y, flat(x), a, b, *route))
        return out.reshape(shape[0], size, shape[2], -1), 1
    groups = x.shape[1 if x_dim == 0 else 0] if x_dim is not None else x.shape[0]
    a_rows, b_rows = (f.shape[1 if d == 0 else 0] if d is not None else 0 for f, d in ((a, a_dim), (b, b_dim)))
    a, b = (f if d is None else _merged(f, d, size) for f, d in ((a, a_dim), (b, b_dim)))
    a_start = _starts(route[0], route_dims[0], size, a_rows)
    b_start = _starts(route[1], route_dims[1], size, b_rows)
    rank, weight = (_merged(z, d, size) for z, d in zip(route[2:], route_dims[2:], strict=True))
    y = None if y is None else _merged(y, y_dim, size)
    out = apply(y, _merged(x, x_dim, size), a, b, a_start, b_start, rank, weight, options)
    return out.reshape(size, groups, *out.shape[1:]), 0


def _batch_grad(operands: Any, dims: Any, *, options: Options) -> Any:
    (x, dy, b, *route), (x_dim, dy_dim, b_dim, *route_dims) = operands, dims
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    b_rows = b.shape[1 if b_dim == 0 else 0] if b_dim is not None else 0
    b = b if b_dim is None else _merged(b, b_dim, size)
    b_start = _starts(route[0], route_dims[0], size, b_rows)
    # Each example has a gradient of its own, one after the other.
    out_start = _starts(route[1], route_dims[1], size, options.total)
    rank, weight = (_merged(z, d, size) for z, d in zip(route[2:], route_dims[2:], strict=True))
    x, dy = _merged(x, x_dim, size), _merged(dy, dy_dim, size)
    out = grad(x, dy, b, b_start, out_start, rank, weight, size * options.total, options)
    return out.reshape(size, options.total, -1), 0


batching.primitive_batchers[apply_p] = _batch_apply
batching.primitive_batchers[grad_p] = _batch_grad


# Derivatives.


def _floating(operands: tuple[Any, ...]) -> list[int]:
    return [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]


def _jvp(primitive: Primitive, primals: Any, tangents: Any, *, options: Options) -> Any:
    """Linear in each floating operand: one term for each that moves. y moves by itself."""
    bind = functools.partial(_rebind, primitive, options)
    out = bind(primals)
    total: Any = None
    adds = primitive is apply_p and options.adds
    for i in _floating(primals):
        if isinstance(tangents[i], ad.Zero):
            continue
        if adds and i == 0:
            total = tangents[0] if total is None else total + tangents[0]
            continue
        moved = [tangents[i] if j == i else x for j, x in enumerate(primals)]
        # The terms are added one on top of the other in the operation itself.
        if primitive is apply_p:
            total = _rebind(primitive, replace(options, adds=False), [total, *moved[1 if adds else 0 :]])
        else:
            term = bind(moved)
            total = term if total is None else total + term
    return out, jnp.zeros_like(out) if total is None else total


def _rebind(primitive: Primitive, options: Options, operands: Any) -> jax.Array:
    if primitive is grad_p:
        x, dy, b, b_start, out_start, rank, weight = operands
        return grad(x, dy, b, b_start, out_start, rank, weight, options.total, options)
    y, x, a, b, a_start, b_start, rank, weight = operands if len(operands) == 8 else (None, *operands)
    return apply(y, x, a, b, a_start, b_start, rank, weight, options)


def _turned(options: Options, dtype: Any) -> Options:
    return replace(options, dtype=jnp.dtype(dtype))


def _transpose_apply(ct: Any, *operands: Any, options: Options) -> Any:
    y, x, a, b, a_start, b_start, rank, weight = operands if options.adds else (None, *operands)
    lost = [None if y is None else ct] if options.adds else []
    if isinstance(ct, ad.Zero):
        return [None] * len(operands)
    unknown = ad.is_undefined_primal
    by = dict.fromkeys(("x", "a", "b", "w"))
    route = (rank, weight)
    if unknown(x):
        by["x"] = apply(None, ct, b, a, b_start, a_start, *route, _turned(options, x.aval.dtype))
    elif unknown(a):
        by["a"] = grad(x, ct, b, b_start, a_start, *route, a.aval.shape[0], _turned(options, a.aval.dtype))
    elif unknown(b):
        by["b"] = grad(ct, x, a, a_start, b_start, *route, b.aval.shape[0], _turned(options, b.aval.dtype))
    elif unknown(weight):
        by["w"] = _by_weight(ct, x, a, b, a_start, b_start, rank, weight.aval.dtype, options)
    return [*lost, by["x"], by["a"], by["b"], None, None, None, by["w"]]


def _transpose_grad(ct: Any, *operands: Any, options: Options) -> Any:
    x, dy, b, b_start, out_start, rank, weight = operands
    if isinstance(ct, ad.Zero):
        return [None] * 7
    unknown = ad.is_undefined_primal
    by = dict.fromkeys(("x", "dy", "b", "w"))
    route = (rank, weight)
    if unknown(x):
        by["x"] = apply(None, dy, b, ct, b_start, out_start, *route, _turned(options, x.aval.dtype))
    elif unknown(dy):
        by["dy"] = apply(None, x, ct, b, out_start, b_start, *route, _turned(options, dy.aval.dtype))
    elif unknown(b):
        by["b"] = grad(dy, x, ct, out_start, b_start, *route, b.aval.shape[0], _turned(options, b.aval.dtype))
    elif unknown(weight):
        by["w"] = _by_weight(dy, x, ct, b, out_start, b_start, rank, weight.aval.dtype, options)
    return [by["x"], by["dy"], by["b"], None, None, None, by["w"]]


def _by_weight(
    ct: Any, x: Any, a: Any, b: Any, a_start: Any, b_start: Any, rank: Any, dtype: Any, options: Options
) -> jax.Array:
    """sum(ct * (x a^T) b) of each group."""
    ones = jnp.ones(rank.shape, dtype)
    y = apply(None, x, a, b, a_start, b_start, rank, ones, _turned(options, ct.dtype))
    return jnp.einsum("gtn,gtn->g", ct, y, preferred_element_type=sum_dtype(ct.dtype)).astype(dtype)


for _p, _transpose in ((apply_p, _transpose_apply), (grad_p, _transpose_grad)):
    ad.primitive_jvps[_p] = functools.partial(_jvp, _p)
    ad.primitive_transposes[_p] = _transpose
