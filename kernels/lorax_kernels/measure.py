"""Measured times on the chip that is here, and which implementation to take: one command for whoever has one.

    python -m lorax_kernels.measure [OUT.json] [--cases 4096x4096,14336x4096] [--rows 16,2048] [--rounds 7]

Needs `pip install lorax-flax[tpu]` (or `[cuda]`) and nothing else. Each case is timed with every implementation that
serves it, in turns, beside the product with a dense weight of the same shape (bfloat16; float32 on a CPU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels import nf4, nf4_matmul
from lorax_kernels.cases import CASES, DECODE_ROWS, TRAIN_ROWS
from lorax_kernels.dispatch import Shapes, backends, current_target, explain, force

ROUNDS, REPEATS = 7, 10


def serving(op: str, shapes: Shapes) -> list[str]:
    """The implementations that can run a case here, chosen or not."""
    found = []
    for backend in backends(op):
        try:
            with force(backend.name):
                explain(op, shapes)
        except ValueError:
            continue
        found.append(backend.name)
    return found


def programs(op: str, m: int, k: int, n: int, dtype: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> jitted function and its arguments: each implementation, and the product with a dense weight."""
    transposed = op == "nf4_matmul_t"
    weight = jax.random.normal(jax.random.key(0), (n, k), dtype)
    q = nf4.for_platform(nf4.quantize(weight), jax.default_backend())
    x = jax.random.normal(jax.random.key(1), (m, n if transposed else k), dtype)
    out: dict[str, Any] = {"dense": (jax.jit(lambda x, w: x @ (w if transposed else w.T)), (x, weight))}
    for name in serving(op, Shapes(m, k, n, jnp.dtype(dtype).name, q.block_size)):
        with force(name):
            program = jax.jit(lambda x, q: nf4_matmul.matmul(x, q, transposed)).lower(x, q).compile()
        out[name] = (program, (x, q))
    return out


def times(runs: dict[str, Any], rounds: int = ROUNDS, repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of a call, the programs taking turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for program, args in runs.values():
        jax.block_until_ready(program(*args))
    for _ in range(rounds):
        for name, (program, args) in runs.items():
            start = time.perf_counter()
            out = None
            for _ in range(repeats):
                out = program(*args)
            jax.block_until_ready(out)
            found[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in found.items()}


def main(words: list[str]) -> None:
    """Measure, print a line for each case, and write all of it.

    Raises:
        SystemExit: arguments that make no sense; says which.
    """
    parser = argparse.ArgumentParser(prog="python -m lorax_kernels.measure", description=__doc__)
    parser.add_argument("out", nargs="?", default="measured.json")
    parser.add_argument("--cases", help="K x N of some cases, 4096x4096,14336x4096; all of them without it")
    parser.add_argument("--rows", default=f"{DECODE_ROWS},{TRAIN_ROWS}", help="rows of x")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each implementation takes its turn")
    given = parser.parse_args(words)
    shapes = [(k, n) for _, k, n in CASES]
    if given.cases is not None:
        known = {f"{k}x{n}": (k, n) for k, n in shapes}
        unknown = [word for word in given.cases.split(",") if word not in known]
        if unknown:
            parser.error(f"{unknown[0]!r} is none of the cases: {', '.join(known)}")
        shapes = [known[word] for word in given.cases.split(",")]
    if given.rounds < 1 or not all(word.isdigit() and int(word) for word in given.rows.split(",")):
        parser.error("--rows and --rounds are whole numbers of at least 1")
    device, dtype = jax.devices()[0], jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rows = []
    for k, n in shapes:
        for m in map(int, given.rows.split(",")):
            for op in ("nf4_matmul", "nf4_matmul_t"):
                seconds = times(programs(op, m, k, n, dtype), given.rounds)
                best = min((name for name in seconds if name != "dense"), key=seconds.__getitem__)
                rows.append({"op": op, "m": m, "k": k, "n": n, "seconds": seconds, "best": best})
                print(
                    f"{op} {m}x{k}x{n}: {best}, {seconds[best] / seconds['dense']:.2f} of the dense product", flush=True
                )
    about = {"device": device.device_kind, "target": current_target(), "dtype": jnp.dtype(dtype).name}
    Path(given.out).write_text(json.dumps({**about, "jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
