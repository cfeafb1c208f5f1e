"""Groups in order of their adapter, for a kernel that sums a gradient over all groups of one adapter before it writes.

Groups of one adapter follow each other, a run; runs begin in the order of their first groups; groups without an adapter
come last. As in `windows`, numbers are found by comparing and summing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

# Of each place: the group there, where its adapter begins in the factor and in the result, its rank (0: nothing to do),
# 1 if a run begins, 1 if one ends, how many runs began before, and the place where the next one begins.
FIELDS = ("group", "row", "out_row", "rank", "begins", "ends", "run", "following")


def runs(
    start: Int[Array, "groups"], out_start: Int[Array, "groups"], rank: Int[Array, "groups"]
) -> Int[Array, "groups_times_8"]:
    """`FIELDS` of each place, one place after the other."""
    groups = rank.shape[0]
    start, out_start, rank = (z.astype(jnp.int32) for z in (start, out_start, rank))
    rank = jnp.maximum(rank, 0)
    at = jnp.arange(groups, dtype=jnp.int32)
    same = (start[:, None] == start) & (out_start[:, None] == out_start) & (rank[:, None] == rank)
    leader = jnp.where(rank > 0, jnp.min(jnp.where(same, at, groups), axis=-1), groups)
    ahead = (leader < leader[:, None]) | ((leader == leader[:, None]) & (at < at[:, None]))
    place = jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    here = place == at[:, None]
    pick = lambda z: jnp.sum(jnp.where(here, z, 0), axis=-1, dtype=jnp.int32)  # noqa: E731
    led = pick(leader)
    busy = led < groups
    edge = led[1:] != led[:-1]
    begins = jnp.concatenate([jnp.ones(1, bool), edge]) & busy
    ends = jnp.concatenate([edge, jnp.ones(1, bool)]) & busy
    run = jnp.sum(begins & (at < at[:, None]), axis=-1, dtype=jnp.int32)
    following = jnp.min(jnp.where(begins & (at > at[:, None]), at, groups), axis=-1)
    # A place without work looks at the block of rows that is there already.
    last = jnp.maximum(jnp.sum(busy, dtype=jnp.int32) - 1, 0)
    group = pick(at)
    group = jnp.where(busy, group, jnp.sum(jnp.where(at == last, group, 0)))
    columns = (group, pick(start), pick(out_start), pick(rank), begins, ends, run, following)
    return jnp.stack([z.astype(jnp.int32) for z in columns], axis=-1).reshape(-1)
