"""What Triton and ptxas make of the grouped product's kernels for a chip: registers, spills, instructions, loads.

    python -m lorax_kernels.static.multi_gpu [OUT.json]      # pip install triton jax; no GPU

A static report of compiled programs, not a measurement: nothing here is a speed. Programs that OUT.json already holds
are kept; delete it to compile them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_kernels.multi_lora.cases import CASES, Case, ids
from lorax_kernels.multi_lora.triton_gpu import constants
from lorax_kernels.multi_lora.triton_plan import Plan, plan
from lorax_kernels.static.gpu import CHIPS, read

KERNELS = ("shrink", "expand", "grad")
# Registers a thread, by chip.
MOST_REGISTERS = {80: 196, 90: 162, 100: 136}
_OPERANDS = {"x": "load_rows(x", "factor": "load_rows(factor", "y": "load_rows(added"}


class Program(NamedTuple):
    """A kernel of the operation x (groups, rows, k) -> (groups, rows, n), bfloat16 with float32 factors."""

    kernel: str
    groups: int
    rows: int
    k: int
    n: int
    rank: int

    def cut(self) -> Plan:
        return plan(self.groups, self.rows, self.k, self.n, self.rank, 2)


def programs(cases: Any = CASES) -> Iterator[Program]:
    """Every kernel of every case: the product, its gradient in x, and those in both factors, each program once."""
    seen = set()
    for case in cases:
        for k, n in ((case.k, case.n), (case.n, case.k)):
            for kernel in KERNELS:
                program = Program(kernel, case.groups, case.rows, k, n, max(case.ranks))
                key = (kernel, *sorted(constants(kernel, program.cut(), case.rows).items()))
                if key not in seen:
                    seen.add(key)
                    yield program


def compile_for(program: Program, capability: int) -> dict[str, Any]:
    """Compile for a chip and read what came out, as `static.gpu.compile_for`."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from lorax_kernels.multi_lora import triton_kernels

    kernel = getattr(triton_kernels, program.kernel)
    fixed = constants(program.kernel, program.cut(), program.rows)
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    halves, wide = ("x", "like", "added", "y"), ("factor", "weight", "h", "zeros", "g")
    given = dict.fromkeys(halves, "*bf16") | dict.fromkeys(wide, "*fp32")
    types = {name: given.get(name, "*i32") for name in kernel.arg_names if name not in fixed}
    # Arrays begin at multiples of 256 bytes under XLA.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), constexprs=fixed, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read(built, triton_kernels, _OPERANDS)


def traffic(case: Case, op: str) -> dict[str, int]:
    """Bytes of a case's operation that cross from and to device memory, and the least that must.

    op: `"multi_lora"`; `"multi_lora_grad"`, the gradient of the first factor. Rows without an adapter and adapters
    without rows move nothing. A factor is read once for each run of its rows, and found in the cache by the tiles that
    follow; h is written and read between the launches.
    """
    chosen = np.asarray(ids(case))
    used = int((chosen >= 0).sum()) * case.rows
    ranks = np.asarray(case.ranks)
    read_ranks = int(ranks[np.unique(chosen[chosen >= 0])].sum())
    contracted, free = (case.k, case.n) if op == "multi_lora" else (case.n, case.k)
    cut = plan(case.groups, case.rows, contracted, free, int(ranks.max()), 2)
    blocks = -(-ranks // cut.block_rank)
    row_blocks = int(blocks[chosen[chosen >= 0]].sum()) * case.rows
    # Parts are summed in between.
    h = (2 if cut.split == 1 else 2 * cut.split + 2) * row_blocks * cut.block_rank * 4
    if op == "multi_lora":
        least = 2 * used * (case.k + 2 * case.n) + 4 * read_ranks * (case.k + case.n)
        return {"moved": least - 2 * used * case.k + 2 * row_blocks * case.k + h, "least": least}
    least = 2 * used * (case.k + case.n) + 4 * read_ranks * case.n + 4 * int(ranks.sum()) * case.k
    again = 2 * row_blocks * (case.k + case.n) - 2 * used * (case.k + case.n)
    return {"moved": least + again + h + 2 * 4 * read_ranks * case.k, "least": least}


def figures(program: Program, capability: int) -> dict[str, Any]:
    """The report of one program."""
    return {**program._asdict(), "chip": f"sm_{capability}", **compile_for(program, capability)}


def moved() -> Iterator[dict[str, Any]]:
    """The bytes of every case, forward and the gradient of a factor."""
    for case in CASES:
        for op in ("multi_lora", "multi_lora_grad"):
            found = traffic(case, op)
            over = round(found["moved"] / found["least"], 3)
            yield {"op": op, "case": case.name, **found, "bytes_over_least": over}


def main(path: str = "kernels/results/multi_lora_gpu.json") -> None:
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("triton", "jax")}
    note = "compiled for these chips and read from the program; nobody ran it there"
    about = {"command": "python -m lorax_kernels.static.multi_gpu", "note": note, "versions": versions}
    kept = json.loads(Path(path).read_text())["programs"] if Path(path).exists() else []
    rows = {(*(row[name] for name in Program._fields), row["chip"]): row for row in kept}
    wanted, traffic = [(program, chip) for program in programs() for chip in CHIPS], list(moved())
    for program, chip in wanted:
        key = (*program, f"sm_{chip}")
        if key not in rows:
            rows[key] = figures(program, chip)
            found = [rows[done] for p, c in wanted if (done := (*p, f"sm_{c}")) in rows]
            Path(path).write_text(json.dumps({**about, "programs": found, "traffic": traffic}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
