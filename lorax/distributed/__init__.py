"""One program on many hosts: joining, rows of a batch for each process, and what all processes agree on.

    import lorax.distributed as pod

    pod.initialize()                                     # the pod, Slurm or JAX_COORDINATOR_ADDRESS says who is who
    mesh = pod.make_mesh("data=8,model=2", batch=64)
    params = lorax.sharding.shard(adapted, mesh)         # every process passes the same tree and keeps its part
    rows = pod.batch_sharding(mesh)
    batch = pod.from_local_rows(mine, rows, 64)          # every process passes its own rows of the global batch

`lorax train --distributed` does all of it.
"""

from lorax.distributed.agree import any_process, barrier, from_main, on_main
from lorax.distributed.rows import batch_sharding, from_local_rows, gather, local_rows
from lorax.distributed.start import Lost, initialize, is_main, make_mesh, process_count, process_index, together

__all__ = [
    "Lost",
    "any_process",
    "barrier",
    "batch_sharding",
    "from_local_rows",
    "from_main",
    "gather",
    "initialize",
    "is_main",
    "local_rows",
    "make_mesh",
    "on_main",
    "process_count",
    "process_index",
    "together",
]
