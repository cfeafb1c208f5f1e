"""Optimizer state that lives in host memory and visits the device for the update alone.

Everything here that depends on a version of JAX or on a platform is in `offloadable`, `_to_host` and `_to_device`.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorax.errors import LoraxError

PINNED = "pinned_host"

# Smaller arrays (counts, norms) stay on the device: a transfer costs more than they do.
_LEAST_BYTES = 4096

# Rows that are folded. More would do as well, but an axis of rows is sharded as before if each shard has whole folds.
_FOLD = 4

_said: set[str] = set()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Folded:
    """An 8-bit array as it waits in host memory: one axis of n rows in two, n / 4 and 4.

    The TPU compiler (libtpu 0.0.42) tiles an 8-bit array of 32 i rows and 128 j columns in one way on the host and in
    another on the chip, and then refuses the copy between the two. With 4 rows, one word of a column, they are alike.
    """

    array: Array
    axis: int = dataclasses.field(metadata={"static": True})


def offloadable(memory_kind: str = PINNED) -> bool:
    """Whether every device of this process can reach that kind of memory.

    Example:
        >>> offloadable("no_such_memory")
        False
    """
    return all(memory_kind in {m.kind for m in device.addressable_memories()} for device in jax.local_devices())


def offload(tx: optax.GradientTransformation, memory_kind: str = PINNED) -> optax.GradientTransformationExtraArgs:
    """Keep the state of an Optax transformation in host memory between steps.

    `init` returns its arrays in host memory, `update` brings them to the device, and puts the new ones back; inside
    `jit` (donate the state) the compiler schedules the copies. Values and updates are those of `tx`, and so is the
    sharding. Arrays under 4 KiB stay on the device. The state can be given on either side: one that was restored
    onto the device moves to the host with the first update. 8-bit arrays may wait as `Folded`.

    Args:
        tx: any Optax transformation.
        memory_kind: `"pinned_host"`, the memory that compiled programs can copy from and to.

    Returns:
        The transformation; `tx` itself, after a warning once a process, where the platform has no such memory.

    Raises:
        LoraxError: another kind of memory.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = offload(optax.adam(1e-3))
        >>> mu = tx.init({"w": jnp.ones(5000)})[0].mu["w"]
        >>> mu.sharding.memory_kind if offloadable() else "pinned_host"
        'pinned_host'
    """
    if memory_kind != PINNED:
        raise LoraxError(f"offload: memory_kind {memory_kind!r}: compiled programs reach only {PINNED!r} of a host")
    inner = optax.with_extra_args_support(tx)
    if not offloadable(memory_kind):
        _warn_once(jax.default_backend())
        return inner

    def init(params: Any) -> Any:
        return _to_host(inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        moved, state = inner.update(updates, _to_device(state), params, **extra)
        return moved, _to_host(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_host(state: Any) -> Any:
    """The state with its large arrays in host memory, sharded as before; traced or not."""

    def move(x: Any) -> Any:
        if not _large(x):
            return x
        axis = _refused_axis(x)
        here = x if axis is None else x.reshape(*x.shape[:axis], x.shape[axis] // _FOLD, _FOLD, *x.shape[axis + 1 :])
        there = jax.device_put(here, jax.memory.Space.Host)
        return there if axis is None else Folded(there, axis)

    return jax.tree.map(move, state)


def _to_device(state: Any) -> Any:
    """The inverse of `_to_host`; arrays that are on the device already stay there."""

    def move(x: Any) -> Any:
        if isinstance(x, Folded):
            here = jax.device_put(x.array, jax.memory.Space.Device)
            return here.reshape(*here.shape[: x.axis], -1, *here.shape[x.axis + 2 :])
        return jax.device_put(x, jax.memory.Space.Device) if _large(x) else x

    return jax.tree.map(move, state, is_leaf=lambda x: isinstance(x, Folded))


def _refused_axis(x: Array) -> int | None:
    """The axis of the rows if x is of a shape that `Folded` is for. Axes of one do not count, as in the compiler."""
    axes = [i for i, n in enumerate(x.shape) if n > 1]
    if x.dtype.itemsize > 1 or len(axes) < 2:
        return None
    rows, columns = axes[-2:]
    return rows if x.shape[rows] % 32 == 0 and x.shape[columns] % 128 == 0 else None


def _large(x: Any) -> bool:
    # Keys of jax.random and objects that are no arrays have no place to be told.
    plain = isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return plain and x.ndim > 0 and x.size * x.dtype.itemsize >= _LEAST_BYTES


def _warn_once(platform: str) -> None:
    if platform in _said:
        return
    _said.add(platform)
    warnings.warn(f"offload: {platform} has no {PINNED} memory; the optimizer state stays on the device", stacklevel=3)
