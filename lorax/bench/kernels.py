"""`lorax bench kernels`: every operation, implementation and shape; timed where it runs here, else as it was compiled.

The times are this machine's. What kernels for other chips were compiled to is read from tables in the repository: the
registers, bundles and bytes of a program that nobody ran there, and no speed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from lorax.bench import record
from lorax.errors import LoraxError

OPERATIONS = ("nf4_dequantise", "nf4_matmul", "nf4_matmul_t", "multi_lora", "multi_lora_grad")


@dataclass(frozen=True)
class KernelsConfig:
    """What is measured."""

    ops: tuple[str, ...] = ()
    """Some operations; all without."""
    gflop: float = 0.6
    """Shapes above so many 10^9 operations of a plain product are not timed, and said to be not."""
    rounds: int = 5
    """Times that each implementation takes its turn."""


def run(config: KernelsConfig) -> dict[str, Any]:
    """Measure, and return everything as plain data.

    Returns:
        `timed`: op, shape, the implementation that the table chooses, seconds of each (none where above `gflop`).
        `refused`: op, shape, implementation and why the table of this machine does not choose it.
        `compiled`: op, shape, implementation, chip and what its compiler made of it.
        `machine`, `versions`, `config`; `figures`, empty.

    Raises:
        LoraxError: an unknown operation, or less than one round.

    Example:
        >>> found = run(KernelsConfig(ops=("multi_lora",), gflop=0, rounds=1))
        >>> {row["op"] for row in found["timed"]}, [row["seconds"] for row in found["timed"]][:2]
        ({'multi_lora'}, [{}, {}])
    """
    unknown = [op for op in config.ops if op not in OPERATIONS]
    if unknown or config.rounds < 1:
        fault = f"{unknown[0]!r} is no operation" if unknown else f"{config.rounds} rounds measure nothing"
        raise LoraxError(f"bench kernels: {fault}; operations are {', '.join(OPERATIONS)}, rounds at least 1")
    import jax
    import jax.numpy as jnp

    from lorax_kernels import explain, matrix, measure

    ops = config.ops or OPERATIONS
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    timed, refused = [], []
    for item in matrix.items(dtype):
        if item.op not in ops:
            continue
        choice = explain(item.op, item.shapes)
        seconds = measure.times(item.programs(), config.rounds, 3) if item.gflop <= config.gflop else {}
        timed.append({"op": item.op, "shape": item.shape, "chosen": choice.chosen, "seconds": seconds})
        refused += [
            {"op": item.op, "shape": item.shape, "backend": name, "why": why} for name, why in choice.refused.items()
        ]
    return {
        "bench": "kernels",
        "config": asdict(config),
        "machine": {**record.machine(), "device": jax.devices()[0].device_kind, "dtype": jnp.dtype(dtype).name},
        "versions": record.versions(),
        "timed": timed,
        "refused": refused,
        "compiled": [row for row in matrix.compiled() if row["op"] in ops],
        "figures": {},
        "seconds": {},
    }


def tables(result: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, columns, rows) of what is printed."""
    device, dtype = result["machine"]["device"], result["machine"]["dtype"]
    limit = f"not timed: above {result['config']['gflop']} GFLOP"
    timed = []
    for row in result["timed"]:
        best = min(row["seconds"], key=row["seconds"].__getitem__, default="")
        for name, seconds in row["seconds"].items():
            marks = [word for word, holds in (("chosen", name == row["chosen"]), ("fastest", name == best)) if holds]
            timed.append((row["op"], row["shape"], name, f"{1e3 * seconds:.3f}", ", ".join(marks)))
        if not row["seconds"]:
            timed.append((row["op"], row["shape"], row["chosen"], "", limit))
    counted = Counter((row["op"], row["backend"], _pattern(row["why"])) for row in result["refused"])
    why = [(op, name, reason, str(count)) for (op, name, reason), count in counted.items()]
    compiled = [(r["op"], r["shape"], r["backend"], r["chip"], r["says"]) for r in result["compiled"]]
    return [
        (f"timed on {device}, {dtype}", ("operation", "shape", "implementation", "ms", ""), timed),
        ("not chosen here", ("operation", "implementation", "why", "shapes"), why),
        (
            "compiled for these chips, and run on none of them",
            ("operation", "shape", "implementation", "chip", ""),
            compiled,
        ),
    ]


def _pattern(why: str) -> str:
    """A reason without its numbers, which differ from shape to shape."""
    return " ".join("N" if word.strip(";,").isdigit() else word for word in why.split())
