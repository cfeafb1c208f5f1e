"""What libtpu makes of the grouped product's kernels, read without a TPU.

    python -m lorax_kernels.static.multi_tpu [OUT.json]      # pip install 'jax[tpu]'; no TPU

Bundles of the compiler's schedule, spills, the loops that multiply, copies of whole factors around the kernel, and the
bytes that a case moves. A schedule, not a measurement: nothing here is a speed. The compiler estimates no cycles of
programs that start their own copies, as these do. Programs that OUT.json already holds are kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_kernels.multi_lora.cases import CASES, Case, ids, table
from lorax_kernels.static.tpu import BUNDLE, PODS, slots

CHIPS = ("v5e", "v6e")
# The groups are long enough for blocks of the gradient's kernel; of the others the table of dispatch says more.
GRADS = ("train", "few ranks")
# Stores of spilled registers.
MOST_SPILLS = 160
# Bundles for each instruction that multiplies 16 rows by a weight of the matrix unit, in the loops of products.
MOST_BUNDLES = {"v5e": 6.5, "v6e": 7.5}
_DUMP = (
    "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.* "
    "--xla_tpu_check_llo_types=false"
)


class Program(NamedTuple):
    """x (groups, rows, k) -> (groups, rows, n) in bfloat16, or the gradient of its first factor; float32 factors."""

    op: str
    chip: str
    groups: int
    rows: int
    k: int
    n: int
    rank: int
    total: int


def lowered(program: Program, factors: str = "float32") -> Any:
    """The program of the whole operation, routing included, lowered for one chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from lorax_kernels.dispatch import force, target
    from lorax_kernels.multi_lora import primitive

    op, chip, groups, rows, k, n, rank, total = program
    put = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=PODS[chip]).devices[0])
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=put)  # noqa: E731
    half, wide, whole = jnp.bfloat16, jnp.float32, jnp.int32
    route = (shape(whole, groups), shape(whole, groups), shape(whole, groups), shape(wide, groups))
    x, y = shape(half, groups, rows, k), shape(half, groups, rows, n)
    a, b = shape(factors, total, k), shape(factors, total, n)

    def apply(y: Any, x: Any, a: Any, b: Any, start: Any, other: Any, ranks: Any, weight: Any) -> Any:
        options = primitive.Options(rank, jnp.dtype(half))
        return primitive.apply(y, x, a, b, start, other, ranks, weight, options)

    def grad(x: Any, dy: Any, b: Any, start: Any, other: Any, ranks: Any, weight: Any) -> Any:
        options = primitive.Options(rank, jnp.dtype(wide))
        return primitive.grad(x, dy, b, start, other, ranks, weight, total, options)

    with target("tpu", chip), force("pallas"):
        if op == "multi_lora":
            return jax.jit(apply, donate_argnums=0).lower(y, x, a, b, *route)
        return jax.jit(grad).lower(x, y, b, *route)


def programs(cases: Any = CASES) -> Iterator[Program]:
    """Every case on every chip: the product, its gradient in x, and those in both factors, each program once."""
    found = {}
    for chip in CHIPS:
        for case in cases:
            for k, n in ((case.k, case.n), (case.n, case.k)):
                sizes = (chip, case.groups, case.rows, k, n, max(case.ranks), sum(case.ranks))
                found[Program("multi_lora", *sizes)] = None
                if case.name.endswith(GRADS):
                    found[Program("multi_lora_grad", *sizes)] = None
    yield from found


def figures(some: list[Program]) -> list[dict[str, Any]]:
    """The report of programs of one chip. Compiles in this process, whose compiler must have been told to dump."""
    folder = Path(re.search(r"xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])  # pyright: ignore
    rows = []
    for program in some:
        for path in folder.iterdir():
            path.unlink()
        text = lowered(program).compile().as_text()
        rows.append({**program._asdict(), **_read(folder, program.op), "copies": copies(text, program)})
    return rows


def copies(text: str, program: Program) -> list[str]:
    """Operations of a compiled program, other than the kernel, that make an array of a whole factor's size."""
    made = rf"= (?:f32|bf16)\[{program.total},(?:{program.k}|{program.n})\]\S* ([\w-]+)\("
    fine = {"parameter", "custom-call", "get-tuple-element", "broadcast", "bitcast"}
    return [name for name in re.findall(made, text) if name not in fine]


def _read(folder: Path, op: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path in folder.glob(f"*-{op}.*final_hlo-static-per-bundle-utilization.txt"):
        out |= slots(path.read_text().splitlines())
    for path in folder.glob(f"*-{op}.*final_bundles.txt"):
        if "analysis" not in path.name:
            out["products"] = multiplying_loops(path.read_text())
    return out


def multiplying_loops(text: str) -> list[list[int]]:
    """[bundles, instructions that multiply] of each innermost loop that has any, from the text of the bundles."""
    bundles = [(mark, len(depth.strip()), body) for mark, depth, body in BUNDLE.findall(text)]
    found = []
    for start, (mark, depth, _) in enumerate(bundles):
        end = next((i for i in range(start, len(bundles)) if bundles[i][1] < depth), len(bundles))
        inside = bundles[start:end]
        if mark == "LB" and not any(mark == "LB" for mark, _, _ in inside[1:]):
            multiplied = sum(body.count("vmatmul") for _, _, body in inside)
            if multiplied:
                found.append([len(inside), multiplied])
    return found


def traffic(case: Case, op: str, chip: str) -> dict[str, Any]:
    """Bytes of a case between HBM and VMEM, and the least: every operand once, and of the factors the ranks in use.

    op: `"multi_lora"`; `"multi_lora_grad"`, the gradient of the first factor. Counted from what the kernels copy for
    the case's own ids. Where rows are put in order first (`sorted`), x and the result move once more each way.
    """
    from lorax_kernels.multi_lora.api import segments

    chosen, ranks = np.asarray(ids(case)), np.asarray(case.ranks)
    m, k, n = case.groups * case.rows, case.k, case.n
    used = int(ranks[np.unique(chosen[chosen >= 0])].sum())
    where = segments(table(case.ranks), ids(case))
    if op == "multi_lora":
        least = 2 * m * (k + 2 * n) + 4 * used * (k + n)
        fetched, sorts, lists = _fetched(case, where, chip)
        moved = 2 * m * (k + 2 * n) + 4 * fetched * (k + n) + lists + sorts * 2 * m * 2 * (k + n)
        return {"moved": moved, "least": least, "sorted": bool(sorts)}
    busy = int((chosen >= 0).sum()) * case.rows
    least = 2 * busy * (k + n) + 4 * used * n + 4 * int(ranks.sum()) * k
    starts = {(int(s), int(r)) for s, r in zip(where.a_start, where.rank, strict=True) if r}
    stripes = sum(8 * -(-(s % 8 + r) // 8) for s, r in starts)
    moved = 2 * busy * (k + n) + 4 * stripes * n + 4 * int(ranks.sum()) * k + 2 * 4 * stripes * k
    return {"moved": moved, "least": least, "sorted": False}


def _fetched(case: Case, where: Any, chip: str) -> tuple[int, int, int]:
    """Rows of the factors that are fetched; whether rows are sorted; bytes of the lists that say what to do."""
    from lorax_kernels.multi_lora.pallas_tpu_plan import plan
    from lorax_kernels.multi_lora.windows import FIELDS, UNITS, windows

    top = max(case.ranks)
    cut = plan(case.groups, case.rows, case.k, case.n, top, "bfloat16", "bfloat16", "float32", chip)
    assert cut is not None, case
    route = [np.asarray(z) for z in (where.a_start, where.b_start, where.rank, where.weight)]
    if cut.sorts:
        route = [np.repeat(z, case.rows) for z in route]
        order = np.lexsort((route[1], route[0], route[2] <= 0))
        route = [z[order] for z in route]
    import jax.numpy as jnp

    a_start, b_start, rank, weight = map(jnp.asarray, route)
    found = windows(a_start, b_start, rank, weight, cut.rows, cut.size, top)
    units = np.asarray(found.units).reshape(cut.tiles, cut.most * UNITS, 3)
    shared = np.asarray(found.tiles).reshape(cut.tiles + 1, len(FIELDS))[1:, FIELDS.index("shared")]
    stripes = np.where(units[..., 2] > 0, -(-(units[..., 0] % 8 + units[..., 2]) // 8), 0)
    lists = found.units.nbytes + found.tiles.nbytes + found.rows.nbytes
    return int(8 * stripes[shared == 0].sum()), int(cut.sorts), lists


def moved() -> Iterator[dict[str, Any]]:
    """The bytes of every case, forward and the gradient of a factor, on every chip."""
    for chip in CHIPS:
        for case in CASES:
            for op in ("multi_lora", *(("multi_lora_grad",) if case.name.endswith(GRADS) else ())):
                found = traffic(case, op, chip)
                over = round(found["moved"] / found["least"], 3)
                yield {"op": op, "chip": chip, "case": case.name, **found, "bytes_over_least": over}


def in_a_process(some: list[Program]) -> list[dict[str, Any]]:
    """`figures` of programs of one chip, in a process whose compiler dumps what it does."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"LIBTPU_INIT_ARGS": _DUMP.format(folder), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        more |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        words = [sys.executable, "-m", "lorax_kernels.static.multi_tpu", "compile", json.dumps(some)]
        done = subprocess.run(words, env=os.environ | more, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiler stopped at one of {some}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(path: str = "kernels/results/multi_lora_tpu.json") -> None:
    from importlib import metadata

    note = "compiled for these chips and read from the compiler's schedule; nobody ran it there"
    versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
    about = {"command": "python -m lorax_kernels.static.multi_tpu", "note": note, "versions": versions}
    kept = json.loads(Path(path).read_text())["programs"] if Path(path).exists() else []
    rows = {Program(*(row[name] for name in Program._fields)): row for row in kept}
    wanted, bytes_moved = list(programs()), list(moved())
    missing = [program for program in wanted if program not in rows]
    while missing:
        part = [program for program in missing[:10] if program.chip == missing[0].chip]
        rows |= dict(zip(part, in_a_process(part), strict=True))
        missing = missing[len(part) :]
        found = [rows[program] for program in wanted if program in rows]
        Path(path).write_text(json.dumps({**about, "programs": found, "traffic": bytes_moved}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        print(json.dumps(figures([Program(*row) for row in json.loads(sys.argv[2])])))
    else:
        main(*sys.argv[1:])
