"""Ranks packed side by side: for each tile of rows, the ranks of all its adapters in windows of 128 columns.

A matrix unit takes 128 ranks at once whether a batch has one adapter of 128 or eight of 16. So a tile of rows meets a
window in which the adapters of all its rows lie next to each other, each from a multiple of 16 on, and every row keeps
the columns of its own adapter:

    h = x [A_1 | A_2 | ..]        zero where a column is not the row's        y += h [B_1; B_2; ..]

Ranks are fetched in units of 16, of which a small adapter fills a part. A tile that needs the one window that the tile
before it has needs nothing fetched.

The numbers are found by comparing everything with everything and summing, which a compiler makes a few loops of. Sorts
and gathers of so few numbers would each be a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNIT, WINDOW = 16, 128
UNITS = WINDOW // UNIT
# What is known of a tile: its windows; 1 if it has the window of the tile before; how many windows were fetched before
# it; the next tile that fetches any; its units.
FIELDS = ("count", "shared", "fetched", "following", "units")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """What the windows hold, and who is in them.

    units: int32, three numbers a unit, `most` windows of 8 units a tile: the first rank of either factor, and how many,
        0 to 16.
    tiles: int32, `FIELDS` of each tile; first those of a tile before all others.
    rows: of each tile, float32 by row: the first column of the row's ranks, the one behind the last, and the weight.
    """

    units: Int[Array, "units_times_3"]
    tiles: Int[Array, "tiles_and_one_times_5"]
    rows: Float[Array, "tiles 8 lanes"]


def entries(rows: int, size: int) -> int:
    """How many groups of `rows` rows a tile of `size` rows has; each row by itself where they do not divide."""
    if rows % size == 0:
        return 1
    return size // rows if size % rows == 0 else size


def most_windows(groups: int, rows: int, size: int, max_rank: int) -> int:
    """A bound on the windows of a tile."""
    return -(-min(entries(rows, size), groups) * -(-max_rank // UNIT) // UNITS)


def windows(
    a_start: Int[Array, "groups"],
    b_start: Int[Array, "groups"],
    rank: Int[Array, "groups"],
    weight: Float[Array, "groups"],
    rows: int,
    size: int,
    max_rank: int,
) -> Windows:
    """The windows of tiles of `size` rows, for groups of `rows` rows each in the order in which they come."""
    groups = rank.shape[0]
    tiles, share = -(-groups * rows // size), entries(rows, size)
    span = size // share
    most = most_windows(groups, rows, size, max_rank)

    def shared(z: jax.Array) -> jax.Array:
        """(tiles, entries): a tile's groups, its part of one, or its rows."""
        z = jnp.broadcast_to(z[:, None], (groups, rows // span)).reshape(-1)
        return jnp.pad(z, (0, tiles * share - z.shape[0])).reshape(tiles, share)

    a, b, r = (shared(z.astype(jnp.int32)) for z in (a_start, b_start, rank))
    r = jnp.maximum(r, 0)
    same = (a[:, :, None] == a[:, None]) & (b[:, :, None] == b[:, None]) & (r[:, :, None] == r[:, None])
    at = jnp.arange(share, dtype=jnp.int32)
    # Entries with one adapter follow the first of them.
    leader = jnp.min(jnp.where(same, at, share), axis=-1)
    width = jnp.where(leader == at, (r + UNIT - 1) // UNIT * UNIT, 0)
    begin = jnp.sum(jnp.where(at < at[:, None], width[:, None], 0), axis=-1)
    low = jnp.sum(jnp.where(leader[:, :, None] == at, begin[:, None], 0), axis=-1)

    column = UNIT * jnp.arange(most * UNITS, dtype=jnp.int32)[:, None]
    done = column - begin[:, None]
    mine = (done >= 0) & (done < width[:, None])
    pick = lambda z: jnp.sum(jnp.where(mine, z, 0), axis=-1)  # noqa: E731
    parts = (a[:, None] + done, b[:, None] + done, jnp.minimum(r[:, None] - done, UNIT))
    units = jnp.stack([pick(z) for z in parts], axis=-1)

    count = (jnp.sum(width, axis=-1) + WINDOW - 1) // WINDOW
    before = jnp.roll(units, 1, axis=0)
    alike = jnp.all(units == before, axis=(1, 2)) & (count == 1) & (jnp.roll(count, 1) == 1)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    alike = alike & (tile > 0)
    fetches = jnp.where(alike, 0, count)
    fetched = jnp.sum(jnp.where(tile < tile[:, None], fetches, 0), axis=-1)
    after = jnp.arange(-1, tiles, dtype=jnp.int32)[:, None]
    following = jnp.min(jnp.where((tile > after) & (fetches > 0), tile, tiles), axis=-1)
    front = lambda z: jnp.pad(z.astype(jnp.int32), (1, 0))  # noqa: E731
    table = jnp.stack([front(count), front(alike), front(fetched), following, front(jnp.sum(width, -1) // UNIT)], -1)

    lanes = -(-size // WINDOW) * WINDOW
    each = jnp.stack([low.astype(jnp.float32), (low + r).astype(jnp.float32), shared(weight.astype(jnp.float32))], 1)
    each = jnp.broadcast_to(each[..., None], (*each.shape, span)).reshape(tiles, 3, size)
    each = jnp.pad(each, ((0, 0), (0, 5), (0, lanes - size)))
    return Windows(units.reshape(-1), table.reshape(-1), each)
