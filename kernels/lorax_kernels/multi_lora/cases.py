"""The shapes that tests and benchmarks of `multi_lora` run: decode, training, per-token routing, and odd ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lorax_kernels.multi_lora.api import Table

# The ranks that people train, mixed in one bank.
MIXED = (4, 8, 16, 32, 64)


class Case(NamedTuple):
    """x (groups, rows, k) and a bank of these ranks for a weight (k, n)."""

    name: str
    groups: int
    rows: int
    k: int
    n: int
    ranks: tuple[int, ...]


def _mixed(count: int) -> tuple[int, ...]:
    return tuple(MIXED[i % len(MIXED)] for i in range(count))


_SHAPES = [("SmolLM2 135M q/o", 576, 576), ("SmolLM2 135M k/v", 576, 192), ("SmolLM2 135M gate/up", 576, 1536)]
_SHAPES += [("SmolLM2 135M down", 1536, 576), ("Llama 3 8B q/o", 4096, 4096), ("Llama 3 8B k/v", 4096, 1024)]
_SHAPES += [("Llama 3 8B gate/up", 4096, 14336), ("Llama 3 8B down", 14336, 4096)]

# One token a request; examples of 64 tokens; a flattened batch whose tokens each have their own adapter.
CASES: list[Case] = [
    Case(f"{name}, {what}", groups, rows, k, n, ranks)
    for name, k, n in _SHAPES
    for what, groups, rows, ranks in (
        ("decode", 32, 1, _mixed(32)),
        ("train", 32, 64, _mixed(32)),
        ("tokens", 2048, 1, _mixed(32)),
        ("few ranks", 32, 64, (16, 16)),
    )
]

# Small enough for an interpreter; nothing is a multiple of anything.
ODD: list[Case] = [
    Case("odd groups", 7, 5, 33, 17, (1, 3, 16, 40, 2)),
    Case("odd rows", 90, 1, 20, 9, (1, 3, 16)),
    Case("one group", 1, 11, 24, 40, (5,)),
    Case("ranks above the width", 6, 3, 4, 3, (1, 2, 70)),
]


def table(ranks: tuple[int, ...], gap: int = 0) -> Table:
    """Adapters of these ranks one after the other, `gap` unused rows before each, scales 0.5, 1, 1.5, ..."""
    sizes = np.asarray(ranks, np.int32)
    start = np.cumsum(sizes + gap, dtype=np.int32) - sizes
    scale = 0.5 * (1 + np.arange(len(ranks), dtype=np.float32))
    return Table(jnp.asarray(start), jnp.asarray(sizes), jnp.asarray(scale))


def ids(case: Case, seed: int = 0) -> Int[Array, "groups"]:
    """An adapter for each group, drawn; every fifth group has none."""
    drawn = np.random.default_rng(seed).integers(0, len(case.ranks), case.groups)
    drawn[2::5] = -1
    return jnp.asarray(drawn, jnp.int32)


def arrays(case: Case, gap: int = 0, seed: int = 0, dtype: str = "float32") -> tuple[Array, Array, Array, Array]:
    """x (groups, rows, k), a (total, k), b (total, n), y (groups, rows, n) of a case; products of about unit size."""
    draw = np.random.default_rng(seed + 1).standard_normal
    total = sum(case.ranks) + gap * len(case.ranks)
    x, y = draw((case.groups, case.rows, case.k)), draw((case.groups, case.rows, case.n))
    a, b = draw((total, case.k)) / np.sqrt(case.k), draw((total, case.n)) / np.sqrt(max(case.ranks))
    return jnp.asarray(x, dtype), jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.asarray(y, dtype)
