"""One step of the model as a pure function: some rows of tokens in, the pool with their keys and values and logits out.

    rows    (n, 1) for decoding; (1, chunk), (4, chunk / 4) for prompts. The same function, other shapes.
    pool    donated: what is new is written in place

The base takes each product once for the whole batch; adapters are added row by row (`delta`). On a mesh every device
runs this with its heads, its part of the MLP, and pages for them; two sums a layer join the parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lorax.lift import lift
from lorax.models import ModelConfig
from lorax.models.steps import head, through_layers
from lorax.serve import delta
from lorax.serve.geometry import Geometry
from lorax.serve.paged import Rows, attend_pages, positions, write_pages


def forward(
    config: ModelConfig,
    place: Geometry,
    params: PyTree,
    pool: Float[Array, "pages size"],
    rows: Rows,
    route: delta.Route,
    axis: str | None = None,
) -> tuple[Float[Array, "pages size"], Float[Array, "rows vocab"]]:
    """The pool with the rows' tokens in it, and float32 logits after each row's last token.

    Args:
        config: the shape of one device's part of the model.
        place: the layout of one device's pool.
        params: the base, plain or with quantised leaves.
        pool, rows, route: see `paged` and `delta`.
        axis: the mesh axis over which layers are split, inside `shard_map`.
    """
    return lift(_forward)(config, place, params, pool, rows, route, axis)


def _forward(
    config: ModelConfig, place: Geometry, params: Any, pool: Array, rows: Rows, route: delta.Route, axis: str | None
) -> tuple[Array, Array]:
    sites = {site.path: i for i, site in enumerate(place.sites)}

    def attending(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Any]:
        return attend_pages(place, pool, rows, layer, _window(config, layer), q, k, v), (k, v)

    def change(path: str, layer: Array, x: Array, y: Array) -> Array:
        y = delta.add(place, pool, sites[path], layer, route, x, y)
        return jax.lax.psum(y, axis) if axis is not None and place.sites[sites[path]].split == "in" else y

    x, (k, v) = through_layers(config, params, rows.ids, positions(rows), attending, change)
    last = jnp.maximum(rows.count - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    logits = head(config, params, x).astype(jnp.float32)
    return write_pages(place, pool, rows, k, v), logits


def _window(config: ModelConfig, layer: Array) -> Array | int | None:
    if config.sliding_window is None or not config.full_layers:
        return config.sliding_window
    return jnp.where(layer < config.full_layers, jnp.int32(2**30), jnp.int32(config.sliding_window))


def local(config: ModelConfig, shards: int) -> ModelConfig:
    """The shape of one device's part."""
    if shards == 1:
        return config
    return replace(
        config,
        num_heads=config.num_heads // shards,
        num_kv_heads=config.num_kv_heads // shards,
        intermediate_size=config.intermediate_size // shards,
    )
