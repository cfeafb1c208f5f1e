"""Rows in order of their adapter, cut into tiles of one adapter each: what a kernel goes through.

Groups are ordered by where their adapter lies. All rows of one adapter then follow each other, and that run is cut into
tiles of `size` rows, the last of a run shorter. Groups without an adapter are in no run.

Only whole numbers move here: a kernel finds the rows of x by `order`. How many tiles there are depends on the data; the
arrays are as long as the most that there can be, and `count` says how many entries are in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Tiles of rows and runs of tiles. All are int32.

    order: the row of x at each place.
    first, rows: the places of a tile, `first .. first + rows`.
    start, other: where its adapter begins in the factor that meets x, and in the second one.
    rank: of its adapter.
    count: the tiles in use, shape (1,).
    run, run_tiles: the first tile of each run, and how many it has.
    runs: the runs in use, shape (1,).
    """

    order: Int[Array, "places"]
    first: Int[Array, "tiles"]
    rows: Int[Array, "tiles"]
    start: Int[Array, "tiles"]
    other: Int[Array, "tiles"]
    rank: Int[Array, "tiles"]
    count: Int[Array, "1"]
    run: Int[Array, "runs"]
    run_tiles: Int[Array, "runs"]
    runs: Int[Array, "1"]


def most_tiles(groups: int, rows: int, size: int) -> int:
    """A bound on the tiles of `groups` groups of `rows` rows: each adapter has at most one tile that is not full."""
    return min(groups * rows // size + groups, groups * (-(-rows // size)))


def tiles(
    start: Int[Array, "groups"], other: Int[Array, "groups"], rank: Int[Array, "groups"], rows: int, size: int
) -> Tiles:
    """The tiles of groups of `rows` rows each.

    Args:
        start, other: where each group's adapter begins, in the first factor and in the second.
        rank: of each group's adapter; 0 for none.
        rows: of each group.
        size: the most rows of a tile.
    """
    groups = rank.shape[0]
    start, other, rank = (z.astype(jnp.int32) for z in (start, other, rank))
    place = jnp.lexsort((rank, other, start, rank <= 0)).astype(jnp.int32)
    start, other, rank = start[place], other[place], rank[place]
    at = jnp.arange(groups, dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones(1, bool), ~_same(start) | ~_same(other) | ~_same(rank)])
    ends = lax.cummin(jnp.where(new, at, groups)[::-1])[::-1]
    ends = jnp.concatenate([ends[1:], jnp.full(1, groups, jnp.int32)])
    begins = new & (rank > 0)
    each = jnp.where(begins, lax.div((ends - at) * rows + (size - 1), jnp.int32(size)), 0)
    upto = jnp.cumsum(each, dtype=jnp.int32)
    tile = jnp.arange(most_tiles(groups, rows, size), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(upto, tile, side="right").astype(jnp.int32), groups - 1)
    first = group * rows + (tile - (upto - each)[group]) * size
    used = tile < upto[-1]
    (run,) = jnp.nonzero(begins, size=groups, fill_value=0)
    return Tiles(
        order=(place[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)).reshape(-1),
        first=jnp.where(used, first, 0),
        rows=jnp.where(used, jnp.minimum(ends[group] * rows - first, size), 0),
        start=start[group],
        other=other[group],
        rank=jnp.where(used, rank[group], 0),
        count=upto[-1:],
        run=(upto - each)[run],
        run_tiles=each[run],
        runs=jnp.sum(begins, dtype=jnp.int32)[None],
    )


def _same(z: jax.Array) -> jax.Array:
    return z[1:] == z[:-1]
