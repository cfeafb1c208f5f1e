"""Where the arrays of a tree lie on a mesh: one small table of rules, followed by factors, blocks and moments."""

from lorax.sharding.place import follow, kept_whole, shard, shardings, specs
from lorax.sharding.rules import ZOO, Rules, batch_axes, roles_of

__all__ = ["ZOO", "Rules", "batch_axes", "follow", "kept_whole", "roles_of", "shard", "shardings", "specs"]
