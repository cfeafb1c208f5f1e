"""Where the arrays of a tree lie on a mesh: one small table of rules, followed by factors, blocks and moments."""

from lorax.sharding.mesh import mesh_sizes
from lorax.sharding.place import follow, kept_whole, shard, shardings, specs
from lorax.sharding.put import put
from lorax.sharding.rules import ZOO, Rules, batch_axes, roles_of

__all__ = [
    "ZOO",
    "Rules",
    "batch_axes",
    "follow",
    "kept_whole",
    "mesh_sizes",
    "put",
    "roles_of",
    "shard",
    "shardings",
    "specs",
]
