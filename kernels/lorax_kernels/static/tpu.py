"""What libtpu's own static schedule says of the kernels, read without a TPU: bundles, slots, spills, estimated cycles.

    python -m lorax_kernels.static.tpu [OUT.json]      # pip install 'jax[tpu]'; no TPU

A schedule, not a measurement. `estimated_cycles` can be wrong for nested loops; bundles count a loop's body once. A
large program takes the compiler a minute: programs that OUT.json already holds are kept. Delete it to compile them all.
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

from lorax_kernels.cases import CASES, DECODE_ROWS, LONG_ROWS, TRAIN_ROWS

PODS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Bundles of the dequantising loop for 1,024 weights.
MOST_BUNDLES = {"v5e": 2.2, "v6e": 1.1, "tpu7x": 1.1}
# Estimated cycles over those of XLA's product of the same shape in bf16, by rows. For tpu7x the compiler estimates no
# program that starts its own copies, as the products do.
MOST_CYCLES = {
    TRAIN_ROWS: {"v5e": 1.08, "v6e": 1.15},
    LONG_ROWS: {"v5e": 1.03, "v6e": 1.10},
}
# Stores of spilled registers more than in XLA's product.
MOST_SPILLS = 160
KERNELS = ("nf4_matmul", "nf4_matmul_t", "nf4_dequantise")
PLAIN = {"nf4_matmul": "bf16_matmul", "nf4_matmul_t": "bf16_matmul_t"}
_REFERENCE = 4096
# A bundle of the schedule's text: its mark, the loops around it, what it does.
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})? *:((?: >+)?) (\{.*)$", re.MULTILINE)
_STORED = 2 * 8 * 128  # weights in a register of bf16 pairs
_FLAGS = (
    "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.* "
    "--xla_jf_dump_static_llo_profile_to={0}/prof --xla_tpu_check_llo_types=false"
)


class Program(NamedTuple):
    """What is compiled once: a kernel, or the product that XLA makes of a bf16 weight."""

    op: str
    chip: str
    m: int
    k: int
    n: int


def programs() -> Iterator[Program]:
    """At the reference size: dequantised; products in decoding, in training and with many rows, and XLA's."""
    size = _REFERENCE
    for chip in PODS:
        yield Program("nf4_dequantise", chip, 1, size, size)
    for rows in (DECODE_ROWS, TRAIN_ROWS, LONG_ROWS):
        for chip in PODS:
            for op, plain in PLAIN.items():
                if chip in MOST_CYCLES.get(rows, {}):
                    yield Program(plain, chip, rows, size, size)
                yield Program(op, chip, rows, size, size)


def compile_for(program: Program) -> None:
    """Compile a program for one chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from lorax_kernels.nf4_matmul import layout_tpu, pallas_tpu

    op, chip, m, k, n = program
    put = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=PODS[chip]).devices[0])
    half = jnp.bfloat16
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=put)  # noqa: E731
    kp, np_ = layout_tpu.padded(k, n)
    words, scales = shape(jnp.int32, kp // 8, np_), shape(jnp.float32, kp // 512, 8, np_)
    x, dy, w = shape(half, m, k), shape(half, m, n), shape(half, k, n)
    run: dict[str, tuple[Any, ...]] = {
        "bf16_matmul": (lambda x, w: x @ w, x, w),
        "bf16_matmul_t": (lambda dy, w: dy @ w.T, dy, w),
        "nf4_matmul": (lambda x, w, s: pallas_tpu.matmul(x, w, s, n=n, chip=chip), x, words, scales),
        "nf4_matmul_t": (lambda dy, w, s: pallas_tpu.matmul_t(dy, w, s, k=k, chip=chip), dy, words, scales),
        "nf4_dequantise": (lambda w, s: pallas_tpu.dequantize(w, s, k, n, half, chip=chip), words, scales),
    }
    function, *arguments = run[op]
    jax.jit(function).lower(*arguments).compile()


def schedule(program: Program) -> dict[str, Any]:
    """The schedule of a program: bundles, used slots by unit, estimated cycles, bundles of the dequantising loop.

    Compiles in a process of its own: the profiler can abort the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        more = {"LIBTPU_INIT_ARGS": _FLAGS.format(folder), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        more |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        words = [sys.executable, "-m", "lorax_kernels.static.tpu", "compile", *map(str, program)]
        done = subprocess.run(words, env=os.environ | more, capture_output=True, text=True)
        found = _read(Path(folder), program.op in KERNELS)
    if "bundles" not in found:
        raise RuntimeError(f"{' '.join(words)}: the compiler left no schedule\n{done.stderr[-2000:]}")
    return found


def _read(folder: Path, kernel: bool) -> dict[str, Any]:
    """The largest operation of the program, or its kernel."""
    mine = lambda name: (name.split(".")[0] in KERNELS) == kernel  # noqa: E731
    out: dict[str, Any] = {}
    for path in folder.glob("*final_hlo-static-per-bundle-utilization.txt"):
        name = re.match(r"\d+-(.+?)-\d+-final_hlo", path.name)
        if name is None or name[1] == "TLP" or name[1].startswith("<") or not mine(name[1]):
            continue
        found = slots(path.read_text().splitlines())
        if found["bundles"] > out.get("bundles", 0):
            out |= found
    cycles = [_profile(path.read_text()) for path in folder.glob("prof/*_static_llo_profile.textproto")]
    out["estimated_cycles"] = max((count for name, count in cycles if name and mine(name)), default=0) or None
    if kernel:
        texts = [path.read_text() for path in folder.glob("*nf4_*final_bundles.txt") if "analysis" not in path.name]
        out["dequantise_bundles_per_1024"] = max(filter(None, map(dequantising_loop, texts)), default=None)
    return out


def _profile(text: str) -> tuple[str, int]:
    name, cycles = re.search(r'hlo_op_name: "([^"]+)"', text), re.search(r"estimated_cycles: (\d+)", text)
    return (name[1], int(cycles[1])) if name and cycles else ("", 0)


def slots(lines: list[str]) -> dict[str, Any]:
    """Bundles of an operation, and how many slots of each unit they use."""
    start = lines.index("== UTILIZATION:")
    units = lines[start - 2].split(", ")
    rows = [[int(v) for v in line.split()] for line in lines[start + 1 :] if line.strip()[:1].isdigit()]
    used = {unit: sum(row[column] for row in rows) for column, unit in enumerate(units)}
    return {"bundles": len(rows), "slots": {unit: count for unit, count in used.items() if count}}


def dequantising_loop(text: str) -> float | None:
    """Bundles for 1,024 weights of the slowest loop that looks codes up, from the text of the bundles.

    A line is `address  mark : >> { ... }`: as many `>` as loops are around it; the mark of a loop's first is LB. The
    loop stores each register of values once, and spilled registers beside.
    """
    bundles = [(mark, len(depth.strip()), body) for mark, depth, body in BUNDLE.findall(text)]
    found = []
    for start, (mark, depth, _) in enumerate(bundles):
        end = next((i for i in range(start, len(bundles)) if bundles[i][1] < depth), len(bundles))
        inside = bundles[start:end]
        if mark != "LB" or any(mark == "LB" for mark, _, _ in inside[1:]):
            continue
        body = "\n".join(body for _, _, body in inside)
        stores = [where for where in re.findall(r"= vst \[([^]]*)\]", body) if "spill" not in where]
        if "vperm.slane" in body:
            found.append(len(inside) / (len(stores) * _STORED / 1024))
    return round(max(found), 3) if found else None


def figures(program: Program, plain: dict[str, Any] | None = None) -> dict[str, Any]:
    """A row of the table. plain: the row of XLA's product of the same shape."""
    from lorax_kernels.nf4_matmul.pallas_tpu_plan import least_bytes, plan

    op, chip, m, k, n = program
    found = {**program._asdict(), **schedule(program)}
    if op in PLAIN:
        blocks = plan(op == "nf4_matmul_t", m, k, n, 2, 0, chip)
        assert blocks is not None
        found |= {"grid": list(blocks.grid), "vmem": blocks.vmem()}
        found["bytes_over_least"] = round(sum(blocks.moved().values()) / least_bytes(m, k, n, 2), 3)
    if plain is not None and found["estimated_cycles"]:
        found["cycles_over_bf16"] = round(found["estimated_cycles"] / plain["estimated_cycles"], 3)
        found["spills_beyond_bf16"] = found["slots"].get("VSTORE:SPILL", 0) - plain["slots"].get("VSTORE:SPILL", 0)
    return found


def beyond(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What does not reach its bar, among the rows of the table."""
    for row in rows:
        chip = row["chip"]
        bars = {
            "dequantise_bundles_per_1024": MOST_BUNDLES[chip],
            "cycles_over_bf16": MOST_CYCLES.get(row["m"], {}).get(chip),
            "spills_beyond_bf16": MOST_SPILLS,
        }
        for figure, bar in bars.items():
            reached = row.get(figure)
            if reached is not None and bar is not None and reached > bar:
                yield {"op": row["op"], "chip": chip, "m": row["m"], "figure": figure, "reached": reached, "bar": bar}


def moved(chip: str, m: int, k: int, n: int, transposed: bool, rank: int = 0) -> tuple[float, float]:
    """Bytes between HBM and VMEM over the least: of the arrays' elements, and of the tiles that the arrays occupy.

    A TPU keeps arrays in whole tiles, (16, 128) of bf16: fewer bytes than those nobody can move.
    """
    from lorax_kernels.nf4_matmul.pallas_tpu_plan import least_bytes, plan

    blocks = plan(transposed, m, k, n, 2, rank, chip)
    assert blocks is not None
    tile = lambda size, unit: -(-size // unit) * unit  # noqa: E731
    total = sum(blocks.moved().values())
    tiles = least_bytes(tile(m, 16), tile(k, 128), tile(n, 128), 2, rank)
    return round(total / least_bytes(m, k, n, 2, rank), 3), round(total / tiles, 3)


def traffic() -> Iterator[dict[str, Any]]:
    """The bytes of every case on every chip, in decoding, training and with many rows, forward and backward."""
    for chip in PODS:
        for _, k, n in CASES:
            for m in (DECODE_ROWS, TRAIN_ROWS, LONG_ROWS):
                for op in PLAIN:
                    least, tiles = moved(chip, m, k, n, op == "nf4_matmul_t")
                    row = Program(op, chip, m, k, n)._asdict()
                    yield {**row, "bytes_over_least": least, "bytes_over_tiles": tiles}


def main(path: str = "kernels/results/tpu.json") -> None:
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
    note = "compiled for these chips and read from the compiler's schedule; nobody ran it there"
    about = {"command": "python -m lorax_kernels.static.tpu", "note": note, "versions": versions}
    kept = json.loads(Path(path).read_text())["programs"] if Path(path).exists() else []
    rows = {Program(**{name: row[name] for name in Program._fields}): row for row in kept}
    wanted, bytes_moved = list(programs()), list(traffic())
    for program in wanted:
        if program not in rows:
            rows[program] = figures(program, rows.get(program._replace(op=PLAIN.get(program.op, ""))))
        done = [rows[p] for p in wanted if p in rows]
        table = {**about, "beyond_the_bars": list(beyond(done)), "programs": done, "traffic": bytes_moved}
        Path(path).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        op, chip, *sizes = sys.argv[2:7]
        m, k, n = map(int, sizes)
        compile_for(Program(op, chip, m, k, n))
    else:
        main(*sys.argv[1:])
