"""The shapes that tests and benchmarks run: every distinct (in, out) of the models people fine-tune, and odd ones."""

from __future__ import annotations

from typing import NamedTuple

DECODE_ROWS = 16
TRAIN_ROWS = 2048
LONG_ROWS = 8192
BLOCK_SIZE = 64
RANK = 16


class Case(NamedTuple):
    """A kernel W [k, n] and where it occurs first."""

    name: str
    k: int
    n: int


def _decoder(name: str, hidden: int, query: int, key: int, inner: int) -> list[Case]:
    """The linear weights of a Llama-style block."""
    return [
        Case(f"{name} q", hidden, query),
        Case(f"{name} k/v", hidden, key),
        Case(f"{name} o", query, hidden),
        Case(f"{name} gate/up", hidden, inner),
        Case(f"{name} down", inner, hidden),
    ]


_ALL = [
    *_decoder("Llama 3 8B", 4096, 4096, 1024, 14336),
    *_decoder("Llama 3 70B", 8192, 8192, 1024, 28672),
    *_decoder("Qwen3 0.6B", 1024, 2048, 1024, 3072),
    *_decoder("Qwen3 1.7B", 2048, 2048, 1024, 6144),
    *_decoder("Qwen3 4B", 2560, 4096, 1024, 9728),
    *_decoder("Qwen3 8B", 4096, 4096, 1024, 12288),
    *_decoder("Qwen3 14B", 5120, 5120, 1024, 17408),
    *_decoder("Qwen3 32B", 5120, 8192, 1024, 25600),
    *_decoder("SmolLM2 135M", 576, 576, 192, 1536),
    *_decoder("SmolLM2 360M", 960, 960, 320, 2560),
    *_decoder("SmolLM2 1.7B", 2048, 2048, 2048, 8192),
    # Neither a multiple of a tile; a single block; fewer columns than a lane has.
    Case("odd narrow", 192, 70),
    Case("odd wide", 320, 1000),
    Case("one block", 64, 1),
    Case("odd long", 11008, 4001),
]

CASES: list[Case] = list({(case.k, case.n): case for case in reversed(_ALL)}.values())[::-1]
