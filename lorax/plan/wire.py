"""Bytes over the interconnect in a step, on paper: what one chip receives, at the least that each collective needs.

m tokens a chip, w bytes a value, T parts of `model`, F of FSDP, D of the batch. p passes over the layers: forward, once
more with remat, backward. The stream is split over `model`, so what a row-parallel map sums stays scattered.
A compiler may overlap gathers with products as rings of permutes, which send up to twice as much.

    fsdp        (F - 1) / F x (p x layers' bytes + tables' bytes) / T        weights, as they are held; of quantised
                                                                             ones two passes share what they gather
    tensor      (T - 1) / T x L m d w x (2 gathers x p + sums)               the stream; sums: 2 forward, 2 backward,
                                                                             1 again with remat
    lora        2 (T - 1) / T x m r x 4 x p for each row-parallel matrix     sums of x A
    gradients   2 (D - 1) / D x bytes of what trains on a chip               over the parts of the batch
    bank        2 (F - 1) / F x B x r S x 4 x p / T                          a mixed batch of B rows instead: factors of
                                                                             each row's adapter, gradients' way back
"""

from __future__ import annotations

import jax.numpy as jnp

from lorax.bank import Bank
from lorax.plan.job import Job, Trees, chip_bytes, total_bytes
from lorax.plan.parts import base_of, layers_of, low_rank, rank_of
from lorax.tree import join, named_leaves
from lorax.weights import Change, Full


def step_wire(job: Job, given: Trees) -> dict[str, float]:
    """Reason -> bytes that one chip receives in a step.

    Args:
        job: the step.
        given: its trees.
    """
    c, w = job.config, jnp.dtype(job.dtype).itemsize
    m = job.batch * job.seq // job.data_parts
    passes = 1 if job.method == "head" else 3 if job.remat else 2
    sums = {1: 2, 2: 4, 3: 5}[passes]
    share = lambda parts: (parts - 1) / parts  # noqa: E731
    layers, tables = _bases(given)
    tensor, fsdp = job.tensor_parts, job.fsdp_parts
    wire = {
        "fsdp": share(fsdp) * (layers * (min(passes, 2) if job.packed else passes) + tables) / tensor,
        "tensor": share(tensor) * c.num_layers * m * c.hidden_size * w * (2 * passes + sums),
        "lora": 2 * share(tensor) * m * 4 * passes * _row_ranks(given),
    }
    if job.mixed:
        # Whichever device has a row of a factor, all of them sum what each found: zeros but for one.
        wire["bank"] = 2 * share(fsdp) * job.batch * low_rank(given.trainable) * 4 * passes / tensor
    else:
        wire["gradients"] = 2 * share(job.data_parts) * chip_bytes(given.trainable)
    return {reason: float(size) for reason, size in wire.items()}


def _bases(given: Trees) -> tuple[float, float]:
    """Bytes of the layers' weights and of the tables, factors left out."""
    layers = tables = 0.0
    trained = dict(named_leaves(given.trainable))
    for path, leaf in named_leaves(given.frozen):
        base = base_of(leaf)
        size = total_bytes(base) + (total_bytes(trained[path]) if isinstance(leaf, Full) else 0)
        if path.startswith("layers/"):
            layers += size
        else:
            tables += size
    return layers, tables


def _row_ranks(given: Trees) -> int:
    """The sum, over all layers, of the ranks of row-parallel matrices."""
    total = 0
    for path, leaf in named_leaves(join(given.trainable, given.frozen)):
        if isinstance(leaf, (Change, Bank)) and path.split("/")[-2] in ("o_proj", "down_proj"):
            total += rank_of(leaf) * layers_of(leaf)
    return total
