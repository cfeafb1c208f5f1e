"""The table that is drawn again and again: ways to fine-tune, and serving many adapters, by memory and adapter size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax.plan.closed import PARTS, estimate
from lorax.plan.job import Job, chip_bytes, total_bytes, trees
from lorax.plan.parts import base_of, learned
from lorax.tree import named_leaves


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
    """Full fine-tuning, the head alone, LoRA, QLoRA, `adapters` adapters trained together, and so many served, over the
    base in 16 and 4 bits.
    """
    rows = []
    for method in ("full", "head", "lora", "qlora", "multi-lora", "multi-qlora"):
        if method.startswith("multi-") and (job.variant, job.optimizer) != ("lora", "adamw"):
            continue
        one = dataclasses.replace(job, method=method, adapters=adapters)
        found = estimate(one)
        trained, count = found.parameters["trained"], adapters if one.mixed else 1
        # Adapters are saved in float32, whole weights in the dtype of the base.
        size = found.bytes["adapter"] // count or trained * jnp.dtype(job.dtype).itemsize
        name = f"{method[6:]} x {count}" if one.mixed else method
        rows.append(Row(name, trained, found.bytes, found.chip_total, _fits(job, found.chip_total), size))
    return rows + [_serving(dataclasses.replace(job, method=method), adapters) for method in ("lora", "qlora")]


def _serving(job: Job, count: int) -> Row:
    """`count` adapters in 16 bits beside the base, and a cache of keys and values for batch x seq tokens.

    cache = 2 L x batch x seq x kv_heads x head_dim x bytes, split over the batch and the heads
    """
    c, w = job.config, jnp.dtype(job.dtype).itemsize
    given = trees(job)
    half = jax.tree.map(_in(jnp.bfloat16), learned(given))
    base = [base_of(leaf) for _, leaf in named_leaves(given.frozen)]
    cache = 2 * c.num_layers * job.batch * job.seq * c.num_kv_heads * c.head_dim * w
    parts = job.data_parts * math.gcd(job.tensor_parts, c.num_kv_heads)
    size = total_bytes(half)
    whole = {"base": total_bytes(base), "adapter": count * size, "gradients": 0, "optimizer": 0}
    chip = chip_bytes(base) + count * chip_bytes(half) + cache // parts
    name = f"serve {count}, {'nf4' if job.packed else '16 bit' if w == 2 else '32 bit'}"
    return Row(name, 0, {**whole, "activations": cache}, chip, _fits(job, chip), size)


def _in(dtype: Any) -> Any:
    return lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _fits(job: Job, size: float) -> bool:
    return size <= job.target.chip.capacity


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [{**dataclasses.asdict(row), "bytes": {part: row.bytes[part] for part in PARTS}} for row in rows]
