"""What adapters add to a linear map, read from the pages where their factors lie.

    y[row] += scale (x[row] A_i) B_i            i the adapter of the row

The ranks of a batch are cut into pieces of `PIECE`. A loop takes some pieces at a time, so that a
rank costs what it needs, mixed ranks are mixed pieces, and a batch without adapters costs nothing; how often it turns
is data. With one token a row both products are sums that read the pages as they go; nothing is copied out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorax.serve.geometry import Geometry

# Ranks in a piece: what is not a multiple computes up to 7 rows for nothing.
PIECE = 8
# Pieces that a turn of the loop takes: fewer are more turns, with more the last one has more empty places.
GROUP = 16


class Route(NamedTuple):
    """Which adapter each row has, for all sites. Arrays of the host; sites in front.

    turns: how often each site's loop turns.
    row: the row of each piece. first: its first rank. A piece that is none has a first rank above every rank.
    rank: of each row's adapter, 0 without one. scale: of each row in each layer.
    table: the pages that hold each row's factors.
    """

    turns: Int[Any, "sites"]
    row: Int[Any, "sites pieces"]
    first: Int[Any, "sites pieces"]
    rank: Int[Any, "sites rows"]
    scale: Float[Any, "sites rows layers"]
    table: Int[Any, "sites rows width"]


def pieces_of(max_rank: int) -> int:
    """Pieces that a row may need."""
    return -(-max_rank // PIECE)


def at_once(rows: int) -> int:
    """Pieces that a turn takes."""
    return min(rows, GROUP)


def table_width(place: Geometry, max_rank: int) -> int:
    """Pages that an adapter may need at one site."""
    return max(place.pages_of_weight(i, max_rank) for i in range(len(place.sites)))


def empty_route(place: Geometry, rows: int, max_rank: int) -> Route:
    """A route of so many rows without adapters, NumPy arrays."""
    sites, group = len(place.sites), at_once(rows)
    count = -(-rows * pieces_of(max_rank) // group) * group
    return Route(
        np.zeros(sites, np.int32),
        np.zeros((sites, count), np.int32),
        np.full((sites, count), max_rank, np.int32),
        np.zeros((sites, rows), np.int32),
        np.zeros((sites, rows, place.layers), np.float32),
        np.zeros((sites, rows, table_width(place, max_rank)), np.int32),
    )


def fill_route(route: Route, rows: int, max_rank: int) -> None:
    """`turns`, `row` and `first` of a route whose ranks are set; in place."""
    for site in range(route.rank.shape[0]):
        ranks = np.asarray(route.rank[site])
        need = -(-ranks // PIECE)
        total = int(need.sum())
        row = np.repeat(np.arange(rows, dtype=np.int32), need)
        start = np.repeat(np.cumsum(need) - need, need)
        route.row[site, :total], route.row[site, total:] = row, 0
        route.first[site, :total] = (np.arange(total) - start) * PIECE
        route.first[site, total:] = max_rank
        route.turns[site] = -(-total // at_once(rows))


def add(
    place: Geometry,
    pool: Float[Array, "pages size"],
    site: int,
    layer: Int[Array, ""],
    route: Route,
    x: Float[Array, "tokens in"],
    y: Float[Array, "tokens out"],
) -> Float[Array, "tokens out"]:
    """y with the adapters' changes; a row's tokens lie one after the other."""
    rows = route.rank.shape[1]
    group = at_once(rows)
    units = pool.reshape(-1, place.unit)
    row, first, rank, scale, table = (z[site] for z in (route.row, route.first, route.rank, route.scale, route.table))
    by_row = x.reshape(rows, -1, x.shape[-1])
    product = functools.partial(_one_token if by_row.shape[1] == 1 else _many_tokens, x.dtype)

    def turn(i: Array, out: Array) -> Array:
        at = jax.lax.dynamic_slice_in_dim(row, i * group, group)
        ranks, tables = rank[at], table[at]
        p = jax.lax.dynamic_slice_in_dim(first, i * group, group)[:, None] + jnp.arange(PIECE, dtype=jnp.int32)
        mine = p < ranks[:, None]
        # What is no rank of this adapter reads its first one, which is finite if the adapter is, and counts as zero.
        p = jnp.where(mine, p, 0)
        a, b = (_rows(place, units, site, layer, ranks, tables, p, which) for which in ("a", "b"))
        weight = jnp.where(mine, scale[at, layer][:, None], 0)
        change = jnp.where(mine[:, :1, None], product(by_row[at], a, b, weight), jnp.zeros((), x.dtype))
        return out.at[at].add(change.astype(out.dtype))

    out = jax.lax.fori_loop(jnp.int32(0), route.turns[site], turn, y.reshape(rows, -1, y.shape[-1]))
    return out.reshape(y.shape)


def _rows(
    place: Geometry, units: Array, site: int, layer: Array, ranks: Array, tables: Array, p: Array, which: str
) -> Float[Array, "pieces PIECE features"]:
    """Rows of factors out of the pages."""
    at = place.sites[site]
    ui, uo = at.size_in // place.unit, at.size_out // place.unit
    n = layer * ranks[:, None] * (ui + uo) + (p * ui if which == "a" else ranks[:, None] * ui + p * uo)
    n = n[:, :, None] + jnp.arange(ui if which == "a" else uo, dtype=jnp.int32)
    size = jnp.int32(place.page_units)
    page = jnp.take_along_axis(tables[:, None], n // size, axis=2, mode="promise_in_bounds")
    found = units.at[page * size + n % size].get(mode="promise_in_bounds")
    return found.reshape(*p.shape, -1)


def _one_token(dtype: jnp.dtype, x: Array, a: Array, b: Array, weight: Array) -> Float[Array, "pieces 1 out"]:
    """Sums over what is read, in float32: a compiler makes one loop of the look-up, the product and the sum."""
    wide = jnp.float32
    h = jnp.sum(x.astype(wide) * a.astype(dtype).astype(wide), axis=2) * weight
    return jnp.sum(h.astype(dtype).astype(wide)[:, :, None] * b.astype(dtype).astype(wide), axis=1)[:, None]


def _many_tokens(dtype: jnp.dtype, x: Array, a: Array, b: Array, weight: Array) -> Float[Array, "pieces tokens out"]:
    wide = {"preferred_element_type": jnp.float32}
    h = jnp.einsum("gtk,gpk->gtp", x, a.astype(dtype), **wide) * weight[:, None]
    return jnp.einsum("gtp,gpn->gtn", h.astype(dtype), b.astype(dtype), **wide)
