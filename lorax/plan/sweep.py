"""The table that is drawn again and again: ways to fine-tune, and serving many adapters, by memory and adapter size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax import split
from lorax.plan.closed import PARTS, estimate
from lorax.plan.job import Job, adapted, chip_bytes, total_bytes
from lorax.sharding import shard
from lorax.tree import named_leaves
from lorax.weights import LowRank


@dataclass(frozen=True)
class Row:
    """One way.

    trained: parameters. bytes: part -> bytes over the whole job; chip: all of a chip. adapter_file: bytes of what a
    run saves, or of one adapter that is served.
    """

    name: str
    trained: int
    bytes: dict[str, int]
    chip: int
    fits: bool
    adapter_file: int


def sweep(job: Job, adapters: int) -> list[Row]:
    """Full fine-tuning, the head alone, LoRA, QLoRA, and serving `adapters` adapters over the base in 16 and 4 bits."""
    rows = []
    for method in ("full", "head", "lora", "qlora"):
        one = dataclasses.replace(job, method=method)
        found = estimate(one)
        trained = found.parameters["trained"]
        # Adapters are saved in float32, whole weights in the dtype of the base.
        size = found.bytes["adapter"] or trained * jnp.dtype(job.dtype).itemsize
        rows.append(Row(method, trained, found.bytes, found.chip_total, _fits(job, found.chip_total), size))
    return rows + [_serving(dataclasses.replace(job, method=method), adapters) for method in ("lora", "qlora")]


def _serving(job: Job, count: int) -> Row:
    """`count` adapters in 16 bits beside the base, and a cache of keys and values for batch x seq tokens.

    cache = 2 L x batch x seq x kv_heads x head_dim x bytes, split over the batch and the heads
    """
    c, w = job.config, jnp.dtype(job.dtype).itemsize
    params = shard(adapted(job), job.abstract_mesh())
    trainable, frozen = split(params)
    half = jax.tree.map(_in(jnp.bfloat16), trainable)
    cache = 2 * c.num_layers * job.batch * job.seq * c.num_kv_heads * c.head_dim * w
    parts = job.data_parts * math.gcd(job.tensor_parts, c.num_kv_heads)
    whole = {"base": total_bytes(frozen), "adapter": count * total_bytes(half), "gradients": 0, "optimizer": 0}
    chip = chip_bytes(frozen) + count * chip_bytes(half) + cache // parts
    factors = [x for _, x in named_leaves(trainable) if isinstance(x, LowRank)]
    name = f"serve {count}, {'nf4' if job.method == 'qlora' else '16 bit' if w == 2 else '32 bit'}"
    size = sum(math.prod(x.A.shape) + math.prod(x.B.shape) for x in factors)
    return Row(name, 0, {**whole, "activations": cache}, chip, _fits(job, chip), 2 * size)


def _in(dtype: Any) -> Any:
    return lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _fits(job: Job, size: float) -> bool:
    return size <= job.target.chip.capacity


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [{**dataclasses.asdict(row), "bytes": {part: row.bytes[part] for part in PARTS}} for row in rows]
