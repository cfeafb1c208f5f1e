"""What stands between an operation and a chip's kernel: derivative, batching and partitioning, once for all chips.

    y  = x W + s (x A) B               forward          h  = x A
    dx = dy W^T + s (dy B^T) A^T       backward in x    dh = dy B^T
    dA = s x^T dh      dB = s h^T dy      ds = sum(h * dh)

`custom_vjp` on the outside, `custom_vmap` inside it (a mapped batch of rows becomes more rows), innermost what a mesh
needs: rows and columns are split without moving W, split inputs end in a sum over the devices. Where W says how it lies
(`placement`) that is a `shard_map`; elsewhere `custom_partitioning`, which asks the compiler, and which libtpu lacks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lorax_kernels.dispatch import current_target
from lorax_kernels.nf4.array import QuantizedArray
from lorax_kernels.nf4.codebooks import NF4
from lorax_kernels.nf4.dequantize import resolve_scales
from lorax_kernels.nf4_matmul import layout_tpu
from lorax_kernels.placement import Placement


@dataclass(frozen=True)
class Call:
    """What a kernel call is, besides its arrays."""

    backend: str
    chip: str
    transpose: bool
    lora: bool
    block_size: int
    words: bool  # the codes are in the TPU's order, int32 (k/8, n)
    interpret: bool = False
    placement: Placement | None = None


def matmul(
    backend: str, x: Float[Array, "*rows k"], q: QuantizedArray, transpose: bool = False, interpret: bool = False
) -> Float[Array, "*rows n"]:
    """x @ W or x @ W^T by a kernel."""
    call = _call(backend, q, transpose, False, interpret)
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _matmul(call, rows, _operands(q))
    return y.reshape(*x.shape[:-1], -1)


def lora_matmul(
    backend: str,
    x: Float[Array, "*rows k"],
    q: QuantizedArray,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    scale: Float[Array, ""],
    interpret: bool = False,
) -> Float[Array, "*rows n"]:
    """x W + scale (x A) B by a kernel that reads x once."""
    call = _call(backend, q, False, True, interpret)
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _lora(call, rows, _operands(q), a, b, scale)
    return y.reshape(*x.shape[:-1], -1)


def _call(backend: str, q: QuantizedArray, transpose: bool, lora: bool, interpret: bool) -> Call:
    words = q.layout == "tpu"
    return Call(backend, current_target()[1], transpose, lora, q.block_size, words, interpret, q.placement)


def _operands(q: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """Codes and scales as kernels and partitioning take them: scales of one level, (n, blocks)."""
    assert q.format == "nf4", q.format
    return q.codes, resolve_scales(q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: Call, x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> jax.Array:
    return _mapped(call)(x, *weight)[0]


def _matmul_fwd(call: Call, x: jax.Array, weight: Any) -> tuple[jax.Array, Any]:
    return _matmul(call, x, weight), weight


def _matmul_bwd(call: Call, weight: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    return _matmul(_turned(call), dy, weight), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lora(call: Call, x: jax.Array, weight: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    return _mapped(call)(x, *weight, a, b, scale)[0]


def _lora_fwd(call: Call, x: jax.Array, weight: Any, a: jax.Array, b: jax.Array, scale: jax.Array) -> Any:
    y, h = _mapped(call)(x, *weight, a, b, scale)
    return y, (x, weight, a, b, scale, h)


def _lora_bwd(call: Call, saved: Any, dy: jax.Array) -> Any:
    x, weight, a, b, scale, h = saved
    dx, dh = _mapped(_turned(call))(dy, *weight, a, b, scale)
    wide = {"preferred_element_type": jnp.float32}
    da = scale * jnp.matmul(x.T, dh.astype(x.dtype), **wide)
    db = scale * jnp.matmul(h.T.astype(dy.dtype), dy, **wide)
    return dx, None, da.astype(a.dtype), db.astype(b.dtype), jnp.sum(h * dh).astype(scale.dtype)


_lora.defvjp(_lora_fwd, _lora_bwd)


def _turned(call: Call) -> Call:
    return replace(call, transpose=not call.transpose)


@functools.cache
def _mapped(call: Call) -> Any:
    """The call with a rule for vmap: mapped rows are rows; a mapped weight is one product after the other."""
    split = _partitioned(call)

    @custom_vmap
    def function(x: jax.Array, *weight: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(split(x, *weight))

    @function.def_vmap
    def rule(size: int, mapped: Any, x: jax.Array, *weight: jax.Array) -> Any:
        if not any(mapped[1:]):
            outs = function(x.reshape(-1, x.shape[-1]), *weight)
            outs = tuple(out.reshape(size, -1, out.shape[-1]) for out in outs)
        else:
            args = (x, *weight)
            moving = tuple(arg for arg, m in zip(args, mapped, strict=True) if m)

            def one(parts: Any) -> Any:
                parts = iter(parts)
                return function(*(next(parts) if m else arg for arg, m in zip(args, mapped, strict=True)))

            outs = jax.lax.map(one, moving)
        return outs, tuple(True for _ in outs)

    return function


@functools.cache
def _partitioned(call: Call) -> Any:
    """The call with a rule for meshes."""
    if call.interpret:
        # The interpreter talks to the host in order, which a partitioned call cannot.
        return functools.partial(_run, call)
    if call.placement is not None:
        return functools.partial(_sharded, call)

    @custom_partitioning
    def function(*args: jax.Array) -> tuple[jax.Array, ...]:
        return _run(call, *args)

    def place(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        specs, results, summed = _specs_of_shapes(call, arg_shapes, mesh)
        lower = functools.partial(_run_and_sum, call, summed)
        put = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
        return mesh, lower, tuple(map(put, results)), tuple(map(put, specs))

    def infer(mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
        _, results, _ = _specs_of_shapes(call, arg_shapes, mesh)
        return tuple(NamedSharding(mesh, spec) for spec in results)

    function.def_partition(infer_sharding_from_operands=infer, partition=place, sharding_rule=_rule(call))
    return function


def _rule(call: Call) -> str:
    """Which axes go together, for propagation: rows, columns, rank (i, o, r); blocks and words follow in `_specs`."""
    weight = ("w n", "n s") if call.words else ("n c", "n s")
    free = "k2" if call.transpose else "n"
    x = "m n" if call.transpose else "m k"
    if not call.lora:
        return f"{x}, {', '.join(weight)} -> m {free}"
    return (
        f"{x}, {', '.join(weight)}, k2 r, r n, -> m {free}, m r"
        if call.transpose
        else (f"{x}, {', '.join(weight)}, k r, r n, -> m {free}, m r")
    )


def _specs_of_shapes(call: Call, arg_shapes: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """`_specs` for operands that the compiler has placed."""
    x, codes = arg_shapes[0], arg_shapes[1]
    n_axis, k_axis = (_axis(codes, 1), _axis(codes, 0)) if call.words else (_axis(codes, 0), _axis(codes, 1))
    return _specs(call, _axis(x, 0), n_axis, k_axis, codes.shape, mesh)


def _sharded(call: Call, x: jax.Array, codes: jax.Array, scales: jax.Array, *lora: Any) -> tuple[jax.Array, ...]:
    """The call under `shard_map`, as the weight's own placement says."""
    place = call.placement
    assert place is not None
    rows, (outs, ins) = place.split(x.shape[0]) or None, place.core
    operands, results, summed = _specs(call, rows, outs, ins, codes.shape, place.mesh)
    scatter = _can_scatter(call, results[0], summed[0], codes.shape, place)
    if scatter:
        results = (PartitionSpec(results[0][0], summed[0]), *results[1:])
    run = functools.partial(_run_and_sum, call, summed, scatter=scatter)
    # The kernels say nothing of which axes their results vary over.
    split = jax.shard_map(run, mesh=place.mesh, in_specs=operands, out_specs=results, check_vma=False)
    return split(x, codes, scales, *lora)


def _can_scatter(call: Call, spec: Any, summed: Any, codes: tuple[int, ...], place: Placement) -> bool:
    """Whether a summed result can be left split along its columns, which moves half of what a whole sum does.

    The stream between layers lies so; where it does not, gathering the parts makes up the other half.
    """
    k, n = (codes[0] * 8, codes[1]) if call.words else (codes[1] * 2, codes[0])
    return bool(summed) and spec[1] is None and (k if call.transpose else n) % (place.count(*summed) * 128) == 0


def _run_and_sum(call: Call, summed: Any, *args: jax.Array, scatter: bool = False) -> tuple[jax.Array, ...]:
    outs = []
    for place, (out, axes) in enumerate(zip(_run(call, *args), summed, strict=True)):
        if axes and place == 0 and scatter:
            outs.append(jax.lax.psum_scatter(out, axes, scatter_dimension=1, tiled=True))
        else:
            outs.append(jax.lax.psum(out, axes) if axes else out)
    return tuple(outs)


def _specs(
    call: Call, rows: Any, n_axis: Any, k_axis: Any, codes: tuple[int, ...], mesh: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Specs of the operands and results, and over which mesh axes each result is summed.

    Rows follow x; outputs and inputs of W follow its codes where whole tiles fall on each device. An axis that splits
    the rows splits no weight: its part of the codes is gathered for the product.
    """
    k = codes[0] * 8 if call.words else codes[1] * 2
    used = set(_names(rows))
    n = codes[1] if call.words else codes[0]
    if used & set(_names(n_axis)) or n % (_count(mesh, n_axis) * (128 if call.words else 1)):
        n_axis = None
    used |= set(_names(n_axis))
    if used & set(_names(k_axis)) or k % (_count(mesh, k_axis) * call.block_size):
        k_axis = None
    spec = PartitionSpec
    weight = (spec(k_axis, n_axis) if call.words else spec(n_axis, k_axis), spec(n_axis, k_axis))
    summed, free = (n_axis, k_axis) if call.transpose else (k_axis, n_axis)
    operands = (spec(rows, summed), *weight)
    results, sums = (spec(rows, free),), (_names(summed),)
    if call.lora:
        operands = (*operands, spec(k_axis, None), spec(None, n_axis), spec())
        results, sums = (*results, spec(rows, None)), (*sums, _names(summed))
    return operands, results, sums


def _axis(shape: Any, axis: int) -> Any:
    """The mesh axes that an array's axis is split over."""
    sharding = shape.sharding
    parts = getattr(sharding, "spec", ()) if sharding is not None else ()
    return parts[axis] if axis < len(parts) else None


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _count(mesh: Any, axis: Any) -> int:
    count = 1
    for name in _names(axis):
        count *= mesh.shape[name]
    return count


def _run(call: Call, x: jax.Array, codes: jax.Array, scales: jax.Array, *lora: jax.Array) -> tuple[jax.Array, ...]:
    """One device's kernel."""
    out = _BACKENDS[call.backend](call, x, codes, scales, lora or None)
    return out if isinstance(out, tuple) else (out,)


def _pallas(call: Call, x: jax.Array, codes: jax.Array, scales: jax.Array, lora: Any) -> Any:
    from lorax_kernels.nf4_matmul import pallas_tpu

    n, k = (codes.shape[1], codes.shape[0] * 8) if call.words else (codes.shape[0], codes.shape[1] * 2)
    if call.words:
        words, packed = _whole_tiles(codes, scales.T)
    else:
        words, packed = layout_tpu.pack(codes, scales)
    more: dict[str, Any] = {"lora": lora, "chip": call.chip}
    if call.interpret:
        from jax.experimental.pallas import tpu as pltpu

        more["interpret"] = pltpu.InterpretParams()
    if call.transpose:
        return pallas_tpu.matmul_t(x, words, packed, k=k, **more)
    return pallas_tpu.matmul(x, words, packed, n=n, **more)


def _whole_tiles(words: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words and scales of one device's part of W, filled up to whole tiles by blocks whose scale is zero."""
    blocks, n = scales.shape
    groups = -(-blocks // 8)
    if groups * 8 != blocks:
        words = jnp.pad(words, ((0, 8 * (groups * 8 - blocks)), (0, 0)))
        scales = jnp.pad(scales, ((0, groups * 8 - blocks), (0, 0)))
    return words, scales.reshape(groups, 8, n)


def _triton(call: Call, x: jax.Array, codes: jax.Array, scales: jax.Array, lora: Any) -> Any:
    from lorax_kernels.nf4_matmul import triton_gpu

    run = triton_gpu.matmul_t if call.transpose else triton_gpu.matmul
    return run(x, codes, scales, lora=lora, block_size=call.block_size)


def _plain(call: Call, x: jax.Array, codes: jax.Array, scales: jax.Array, lora: Any) -> Any:
    """The meaning of a call in plain JAX: what the others are tested against, mesh rules included."""
    if call.words:
        k, n = codes.shape[0] * 8, codes.shape[1]
        codes = layout_tpu.unpack(*_whole_tiles(codes, scales.T), k, n)[0]
    # Values written as literals: a table captured from outside could not go through custom_partitioning.
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(codes.shape[0], -1)
    values = sum(jnp.where(nibbles == i, jnp.float32(float(v)), jnp.float32(0)) for i, v in enumerate(NF4))
    weight = (values * jnp.repeat(scales, call.block_size, axis=1)).astype(x.dtype)
    y = jnp.matmul(x, weight if call.transpose else weight.T)
    if lora is None:
        return y
    a, b, scale = lora
    first, second = (b.T, a.T) if call.transpose else (a, b)
    h = jnp.matmul(x, first.astype(x.dtype), preferred_element_type=jnp.float32)
    return y + (scale * h).astype(x.dtype) @ second.astype(x.dtype), h


_BACKENDS = {"pallas": _pallas, "triton": _triton, "plain": _plain}
