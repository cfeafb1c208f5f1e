"""The step on one device, or on several that share each layer (tensor parallelism).

    q, k, v, gate, up    split by what they give: a device has some heads, some of the MLP
    o, down              split by what they take; the devices' results are summed
    pool                 (devices, pages, size): every device has the same pages, for its heads and its part of adapters

Embedding, norms and head are on every device. Source: Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lorax.errors import LoraxError
from lorax.models import ModelConfig
from lorax.serve import delta
from lorax.serve.geometry import Geometry
from lorax.serve.paged import Rows
from lorax.serve.step import forward, local
from lorax.tree import map_named
from lorax.weights import is_structured

AXIS = "tensor"
BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def make(devices: int) -> Mesh | None:
    """A mesh over the first devices; None for one.

    Raises:
        LoraxError: there are fewer.
    """
    if devices == 1:
        return None
    if devices > len(jax.devices()):
        raise LoraxError(f"engine: tensor_parallel={devices}, and there are {len(jax.devices())} devices")
    return Mesh(np.asarray(jax.devices()[:devices]), (AXIS,))


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """What every device has."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def new_pool(place: Geometry, dtype: Any, mesh: Mesh | None) -> Array:
    """Zeros: `(pages, size)`, or `(devices, pages, size)` on a mesh."""
    shape = (place.pages, place.page_size)
    if mesh is None:
        return jnp.zeros(shape, dtype)
    return jnp.zeros((mesh.size, *shape), dtype, device=NamedSharding(mesh, PartitionSpec(AXIS)))


def step(config: ModelConfig, place: Geometry, mesh: Mesh | None) -> Callable[..., Any]:
    """`step(params, pool, rows, route) -> (pool, logits)`."""
    if mesh is None:
        return lambda params, pool, rows, route: forward(config, place, params, pool, rows, route)
    part = local(config, mesh.size)

    def run(params: Any, pool: Array, rows: Rows, route: delta.Route) -> tuple[Array, Array]:
        def one(params: Any, pool: Array, rows: Rows, route: delta.Route) -> tuple[Array, Array]:
            new, logits = forward(part, place, params, pool[0], rows, route, AXIS)
            return new[None], logits

        same = PartitionSpec()
        specs = (partition(params), PartitionSpec(AXIS), same, same)
        mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(AXIS), same), check_vma=False)
        return mapped(params, pool, rows, route)

    return run


def upload(mesh: Mesh | None) -> Callable[..., Array]:
    """`upload(pool, pages, data) -> pool`, data `(devices, pages, size)`."""
    if mesh is None:
        return lambda pool, pages, data: _written(pool, pages, data[0])
    return jax.vmap(_written, (0, None, 0))


def _written(pool: Array, pages: Array, data: Array) -> Array:
    def one(i: Array, pool: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(data, i, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(pool, row, pages[i], 0)

    return jax.lax.fori_loop(0, data.shape[0], one, pool)


def partition(params: Any) -> Any:
    """How each weight lies on the mesh."""
    return map_named(lambda path, _: _spec(path), params)


def _spec(path: str) -> PartitionSpec:
    words = path.split("/")
    if words[0] != "layers" or words[-1] not in ("kernel", "bias") or len(words) < 4:
        return PartitionSpec()
    if words[2] in BY_OUTPUT:
        return PartitionSpec(None, None, AXIS) if words[-1] == "kernel" else PartitionSpec(None, AXIS)
    return PartitionSpec(None, AXIS, None) if words[-1] == "kernel" else PartitionSpec()


def placed(params: Any, mesh: Mesh | None) -> Any:
    """The base on the mesh. What is added after a sum over devices is divided among them first.

    Raises:
        LoraxError: a quantised base, whose blocks run across the parts.
    """
    if mesh is None:
        return params
    if any(map(is_structured, jax.tree.leaves(params, is_leaf=is_structured))):
        raise LoraxError("engine: tensor_parallel serves a base in 16 or 32 bits; load it without quantize")

    def one(path: str, x: Any) -> Any:
        # o's bias is added on every device before the sum over them.
        x = x / mesh.size if path.endswith("o_proj/bias") else x
        return jax.device_put(x, NamedSharding(mesh, _spec(path)))

    return map_named(one, params)
