"""What kernels of the grouped product are told to do, against the groups themselves: tiles, runs and windows."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels.multi_lora import runs as runs_of
from lorax_kernels.multi_lora.runs import runs
from lorax_kernels.multi_lora.tiles import most_tiles, tiles
from lorax_kernels.multi_lora.windows import FIELDS, UNIT, UNITS, WINDOW, most_windows, windows

# start and rank of some adapters: gaps, a rank of more than a unit, of more than a window, two that begin alike.
ADAPTERS = np.array([(0, 0), (3, 5), (11, 16), (30, 40), (3, 2), (75, 130)], np.int32)
SHAPES = [(7, 5, 16), (40, 1, 16), (6, 32, 16), (9, 24, 64)]  # groups, rows, rows of a tile


def drawn(groups, adapters=ADAPTERS):
    chosen = adapters[np.random.default_rng().integers(0, len(adapters), groups)]
    return chosen[:, 0], chosen[:, 0] + 7, chosen[:, 1]


@pytest.mark.parametrize(("groups", "rows", "size"), SHAPES)
def test_tiles_hold_each_row_of_an_adapter_once(groups, rows, size):
    start, other, rank = drawn(groups)
    found = jax.tree.map(np.asarray, tiles(*map(jnp.asarray, (start, other, rank)), rows, size))
    count = int(found.count[0])
    assert count <= most_tiles(groups, rows, size) == len(found.first)
    seen = []
    for first, filled, begin, second, ranks in zip(
        found.first[:count], found.rows[:count], found.start, found.other, found.rank, strict=False
    ):
        mine = found.order[first : first + filled]
        assert 0 < filled <= size
        assert {(start[r // rows], other[r // rows], rank[r // rows]) for r in mine} == {(begin, second, ranks)}
        seen += list(mine)
    assert sorted(seen) == [r for r in range(groups * rows) if rank[r // rows] > 0]
    whole = set(zip(start[rank > 0], other[rank > 0], rank[rank > 0], strict=True))
    assert int(found.runs[0]) == len(whole)
    spans = [list(range(b, b + n)) for b, n in zip(found.run[: len(whole)], found.run_tiles, strict=False)]
    assert list(itertools.chain(*spans)) == list(range(count)), "runs are all tiles, one after the other"


def test_runs_are_groups_in_order_of_their_adapter():
    start, other, rank = drawn(23)
    table = np.asarray(runs(*map(jnp.asarray, (start, other, rank)))).reshape(23, -1)
    rows = [dict(zip(runs_of.FIELDS, row, strict=True)) for row in table]
    busy = [row for row in rows if row["rank"] > 0]
    assert len(busy) == int((rank > 0).sum())
    assert sorted(row["group"] for row in busy) == list(np.flatnonzero(rank > 0))
    for place, row in enumerate(busy):
        g = row["group"]
        assert (row["row"], row["out_row"], row["rank"]) == (start[g], other[g], rank[g])
        before = place > 0 and all(busy[place - 1][name] == row[name] for name in ("row", "out_row", "rank"))
        assert row["begins"] == (not before)
        assert row["run"] == sum(other["begins"] for other in busy[:place])
        later = [i for i in range(place + 1, len(busy)) if busy[i]["begins"]]
        assert row["following"] == (later[0] if later else 23)
        assert row["ends"] == (place + 1 == len(busy) or busy[place + 1]["begins"])
    assert len({(row["row"], row["out_row"], row["rank"]) for row in busy}) == sum(row["begins"] for row in busy)
    assert all(row["group"] == busy[-1]["group"] for row in rows[len(busy) :])


@pytest.mark.parametrize(("groups", "rows", "size"), SHAPES)
def test_windows_hold_the_ranks_of_each_row_of_a_tile_side_by_side(groups, rows, size):
    start, other, rank = drawn(groups)
    weight = np.random.default_rng().normal(size=groups).astype(np.float32)
    found = windows(*map(jnp.asarray, (start, other, rank, weight)), rows, size, 130)
    most, count = most_windows(groups, rows, size, 130), -(-groups * rows // size)
    units = np.asarray(found.units).reshape(count, most * UNITS, 3)
    table = np.asarray(found.tiles).reshape(count + 1, len(FIELDS))
    told = np.asarray(found.rows)
    fetched = 0
    for t in range(count):
        known = dict(zip(FIELDS, table[t + 1], strict=True))
        mine = range(t * size, min((t + 1) * size, groups * rows))
        whole = {(start[r // rows], other[r // rows], rank[r // rows]) for r in mine if rank[r // rows]}
        assert known["units"] == sum(-(-ranks // UNIT) for _, _, ranks in whole)
        assert known["count"] == -(-known["units"] * UNIT // WINDOW) <= most
        assert not units[t, known["units"] :].any()
        for r in mine:
            g, (low, high) = r // rows, told[t, :2, r - t * size].astype(int)
            assert high - low == rank[g]
            assert told[t, 2, r - t * size] == weight[g]
            columns = [(units[t, c // UNIT], c % UNIT) for c in range(low, high)]
            assert [u[0] + i for u, i in columns] == list(range(start[g], start[g] + rank[g]))
            assert [u[1] + i for u, i in columns] == list(range(other[g], other[g] + rank[g]))
            assert all(i < u[2] for u, i in columns)
        alike = t > 0 and known["count"] == 1 == table[t, 0] and (units[t] == units[t - 1]).all()
        assert known["shared"] == alike
        assert known["fetched"] == fetched
        fetched += 0 if alike else known["count"]
    fetching = [t for t in range(count) if table[t + 1, 0] and not table[t + 1, 1]]
    for t in range(-1, count):
        assert table[t + 1, 3] == next((u for u in fetching if u > t), count)


def test_a_tile_that_needs_what_the_one_before_it_has_fetches_nothing():
    start, rank = jnp.full(4, 3, jnp.int32), jnp.array([5, 5, 0, 5], jnp.int32)
    found = windows(start, start, rank, jnp.ones(4), 16, 16, 5)
    table = np.asarray(found.tiles).reshape(5, len(FIELDS))
    assert table[1:, FIELDS.index("shared")].tolist() == [0, 1, 0, 0]
    assert table[1:, FIELDS.index("count")].tolist() == [1, 1, 0, 1]
    assert table[:, FIELDS.index("following")].tolist() == [0, 3, 3, 3, 4]
