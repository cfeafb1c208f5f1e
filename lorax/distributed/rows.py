"""The rows of a global batch that a process has to read, and arrays between one process and all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax.errors import LoraxError
from lorax.sharding import batch_axes


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """How a batch lies on a mesh: its rows, axis number `axis`, over the mesh's batch axes.

    Example:
        >>> batch_sharding(jax.make_mesh((1,), ("data",)), axis=1).spec
        PartitionSpec(None, 'data')
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, batch_axes(mesh.axis_names) or None))


def local_rows(rows: NamedSharding, count: int, axis: int = 0) -> slice:
    """The rows of a batch of `count` that this process's devices hold: those that it has to read.

    Where `model` spans processes, several of them read the same rows.

    Args:
        rows: from `batch_sharding`.
        count: rows of the global batch.
        axis: the axis that has them.

    Example:
        >>> local_rows(batch_sharding(jax.make_mesh((1,), ("data",))), 12)
        slice(0, 12, None)
    """
    shape = (1,) * axis + (count,)
    pieces = [index[axis].indices(count) for index in rows.addressable_devices_indices_map(shape).values() if index]
    return slice(min(p[0] for p in pieces), max(p[1] for p in pieces))


def from_local_rows(
    batch: Mapping[str, np.ndarray], rows: NamedSharding, count: int, axis: int = 0
) -> dict[str, jax.Array]:
    """A global batch out of the rows that each process has read. Nothing is sent.

    Args:
        batch: arrays with this process's rows, `local_rows(rows, count, axis)`, along `axis`.
        rows: from `batch_sharding`.
        count: rows of the global batch.
        axis: the axis of the rows.

    Raises:
        LoraxError: an array has another number of rows.

    Example:
        >>> rows = batch_sharding(jax.make_mesh((1,), ("data",)))
        >>> from_local_rows({"ids": np.ones((6, 4), np.int32)}, rows, 6)["ids"].shape
        (6, 4)
    """
    mine = local_rows(rows, count, axis)

    def one(name: str, x: np.ndarray) -> jax.Array:
        if x.shape[axis] != mine.stop - mine.start:
            raise LoraxError(
                f"{name}: this process brings {x.shape[axis]} rows, and rows {mine.start} to {mine.stop - 1} of the "
                f"batch of {count} are its own"
            )
        shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[axis].indices(count)
            moved = slice(first - mine.start, last - mine.start)
            return x[(*index[:axis], moved, *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, rows, part)

    return {name: one(name, x) for name, x in batch.items()}


def gather(tree: Any) -> Any:
    """Every array of a tree whole, as NumPy in the memory of every process. All of them must call it.

    Example:
        >>> gather({"w": jax.numpy.ones(3)})["w"].sum()
        np.float32(3.0)
    """

    return jax.tree.map(_whole, tree)


# A device holds so many bytes of an array that is on its way to the hosts.
_AT_ONCE = 1 << 28


def _whole(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    if x.nbytes > _AT_ONCE and x.ndim > 1:
        # A stack of layers, layer by layer.
        return np.stack([_whole(x[i]) for i in range(x.shape[0])])
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
