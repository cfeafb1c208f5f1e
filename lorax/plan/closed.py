"""The closed form: what a step needs, by arithmetic over abstract trees. No compiler is asked.

Weights, factors, gradients and moments are counted exactly: the bytes of every array, and on a chip those of its shard.
Activations are estimated, per chip, in bytes. m tokens and b rows a chip, s tokens a row; T parts of `model`, F of
FSDP; d, f hidden and MLP sizes, q = heads x head_dim, v = kv_heads x head_dim; w bytes a value of the arithmetic; L
layers, V vocabulary.

    kept       L m d w / T                                     with remat: the stream between layers
               + L m (d/T + (2 q + 2 v + 2 f) / T) w           without: what each layer marks as kept, too
    layer      m w (14 d + (4 q + 4 v + 6 f) / T)              one layer at work, forward again and backward
    scores     b (heads / T) min(s, block) s x 2 x 4           one block of queries: scores, softmax, gradient
    weights    2 x one layer's weights as they are gathered    F > 1
    loss       m d (2 x 4 + w)                                 gradient of the features
    logits     4 chunk V / T                                   one chunk of rows
    table      V d w / T                                       F > 1: the head, gathered

The two halves of a step are not alive at once: activations = kept + max(layer + scores + weights, loss + logits +
table). Where a head trains alone nothing is kept of the layers below it, and one layer is at work, forward alone:
m w (5 d + (q + 2 v + 2 f) / T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax.models.attention import LONG, QUERY_BLOCK
from lorax.plan.flops import step_flops
from lorax.plan.job import Job, Trees, chip_bytes, total_bytes, trees
from lorax.plan.parts import base_of, learned
from lorax.plan.wire import step_wire
from lorax.quantized import Quantized
from lorax.tree import join, named_leaves

PARTS = ("base", "adapter", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Estimate:
    """What a step needs.

    bytes: part -> bytes over the whole job; per_chip: the same on one chip (the fullest).
    activations: what the activations on a chip are made of; not all of it is alive at once.
    parameters: of the base, and of what trains.
    flops: of a step, over all chips. wire: what a chip receives in a step, by reason.
    """

    bytes: dict[str, int]
    per_chip: dict[str, int]
    activations: dict[str, int]
    parameters: dict[str, int]
    flops: float
    wire: dict[str, float]

    @property
    def chip_total(self) -> int:
        """Bytes that a chip must hold."""
        return sum(self.per_chip[part] for part in PARTS)


def estimate(job: Job) -> Estimate:
    """The closed form of one training step.

    Example:
        >>> from lorax.plan import Job, config_of, parse_target
        >>> job = Job(config_of("llama-3.1-8b"), "lora", parse_target("v5e:4x4"), {"data": 16}, rank=1)
        >>> estimate(job).parameters["trained"]
        2621440
    """
    given = trees(job)
    parts = {name: _each(given, measure) for name, measure in (("bytes", total_bytes), ("chip", chip_bytes))}
    made_of = activations(job, given)
    per_chip = {**parts["chip"], "activations": peak(made_of)}
    whole = {**parts["bytes"], "activations": per_chip["activations"] * job.target.chips}
    params = join(given.trainable, given.frozen)
    return Estimate(
        {part: whole[part] for part in PARTS},
        {part: per_chip[part] for part in PARTS},
        made_of,
        {"base": _parameters(params), "trained": _count(given.trainable)},
        step_flops(job, params),
        step_wire(job, given),
    )


def _each(given: Trees, measure: Any) -> dict[str, int]:
    """Base: all weights of the model, whether they train or not; adapter: what was added, whether it trains or not."""
    trained = measure(given.trainable)
    factors = measure(learned(given))
    return {
        "base": measure(given.frozen) + trained - factors,
        "adapter": factors,
        "gradients": trained,
        "optimizer": measure(given.state.opt_state),
    }


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for _, leaf in named_leaves(params))


def activations(job: Job, given: Trees) -> dict[str, int]:
    """What the activations of a chip are made of, in bytes; the formulas are those of the module."""
    c, parts, w = job.config, job.tensor_parts, jnp.dtype(job.dtype).itemsize
    m = job.batch * job.seq // job.data_parts
    d, f = c.hidden_size, c.intermediate_size / parts
    q, v = c.num_heads * c.head_dim / parts, c.num_kv_heads * c.head_dim / min(parts, c.num_kv_heads)
    stream = d / parts if d % parts == 0 else d
    block = QUERY_BLOCK if job.seq > LONG else job.seq
    weights, table = _in_flight(job, given)
    out = {
        "scores": m * (c.num_heads / parts) * block * 2 * 4,
        "weights": weights,
        "loss": m * d * (2 * 4 + w),
        "logits": 4 * job.chunk * c.vocab_size / parts,
        "table": table,
        "kept": 0,
    }
    if job.method == "head":
        out["layer"] = m * w * (5 * d + q + 2 * v + 2 * f)
    else:
        out["layer"] = m * w * (14 * d + 4 * q + 4 * v + 6 * f)
        out["kept"] = c.num_layers * m * w * stream
        if not job.remat:
            out["kept"] += c.num_layers * m * w * (stream + 2 * q + 2 * v + 2 * f)
    return {name: round(size) for name, size in out.items()}


def peak(made_of: dict[str, int]) -> int:
    """The activations that are alive at once, where the most are."""
    layer = sum(made_of[part] for part in ("layer", "scores", "weights"))
    return made_of["kept"] + max(layer, sum(made_of[part] for part in ("loss", "logits", "table")))


def _in_flight(job: Job, given: Trees) -> tuple[float, float]:
    """Weights beside their resting place, gathered from other chips: two layers' worth, and the largest table."""
    if job.fsdp_parts == 1:
        return 0.0, 0.0
    c, layers, tables = job.config, 0.0, 0.0
    for path, leaf in named_leaves(join(given.trainable, given.frozen)):
        base = base_of(leaf)
        size = total_bytes(base) / job.tensor_parts
        if path.startswith("layers/"):
            layers += size / c.num_layers
        elif not isinstance(base, Quantized):
            tables = max(tables, size)
    return 2 * layers, tables
