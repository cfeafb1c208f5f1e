"""What libtpu's own static schedule says of the kernels, read without a TPU: bundles, slots, spills, estimated cycles.

    python -m lorax_kernels.static.tpu [OUT.json]      # pip install 'jax[tpu]'; no TPU

A schedule, not a measurement. `estimated_cycles` can be wrong for nested loops; bundles count a loop's body once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PODS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
KERNELS = ("nf4_matmul", "nf4_matmul_t", "nf4_dequantise")
_FLAGS = (
    "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final.* "
    "--xla_jf_dump_static_llo_profile_to={0}/prof --xla_tpu_check_llo_types=false"
)


def compile_all(chip: str, m: int, k: int, n: int) -> None:
    """Compile the bf16 product that XLA makes, and the kernels, for one chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from lorax_kernels.nf4_matmul import layout_tpu, pallas_tpu

    put = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=PODS[chip]).devices[0])
    half = jnp.bfloat16
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=put)  # noqa: E731
    kp, np_ = layout_tpu.padded(k, n)
    weight = shape(jnp.int32, kp // 8, np_), shape(jnp.float32, kp // 512, 8, np_)
    x, dy = shape(half, m, k), shape(half, m, n)
    jax.jit(lambda x, w: x @ w).lower(x, shape(half, k, n)).compile()
    jax.jit(lambda x, w, s: pallas_tpu.matmul(x, w, s, n=n, chip=chip)).lower(x, *weight).compile()
    jax.jit(lambda dy, w, s: pallas_tpu.matmul_t(dy, w, s, k=k, chip=chip)).lower(dy, *weight).compile()
    jax.jit(lambda w, s: pallas_tpu.dequantize(w, s, k, n, half, chip=chip)).lower(*weight).compile()


def schedule(chip: str, m: int, k: int, n: int) -> dict[str, dict[str, int]]:
    """The schedule of each program: operation -> bundles, used slots by unit, estimated cycles.

    Compiles in a process of its own: the profiler can abort the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        more = {"LIBTPU_INIT_ARGS": _FLAGS.format(folder), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        more |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        words = [sys.executable, "-m", "lorax_kernels.static.tpu", "compile", chip, str(m), str(k), str(n)]
        done = subprocess.run(words, env=os.environ | more, capture_output=True, text=True)
        found = _read(Path(folder))
    if not {*KERNELS, "xla"} <= set(found):
        raise RuntimeError(f"{' '.join(words)}: the compiler left no schedule\n{done.stderr[-2000:]}")
    return found


def _read(folder: Path) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for path in folder.glob("prof/*_static_llo_profile.textproto"):
        text = path.read_text()
        name, cycles = re.search(r'hlo_op_name: "([^"]+)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if name and cycles:
            out.setdefault(_op(name[1]), {})["estimated_cycles"] = int(cycles[1])
    for path in folder.glob("*final_hlo-static-per-bundle-utilization.txt"):
        name = re.match(r"\d+-(.+?)-\d+-final_hlo", path.name)
        if name is None or name[1] == "TLP" or name[1].startswith("<"):
            continue
        out.setdefault(_op(name[1]), {}).update(_slots(path.read_text().splitlines()))
    return out


def _slots(lines: list[str]) -> dict[str, int]:
    start = lines.index("== UTILIZATION:")
    units = lines[start - 2].split(", ")
    rows = [[int(v) for v in line.split()] for line in lines[start + 1 :] if line.strip()[:1].isdigit()]
    used = {unit: sum(row[column] for row in rows) for column, unit in enumerate(units)}
    return {"bundles": len(rows)} | {unit: count for unit, count in used.items() if count}


def _op(name: str) -> str:
    plain = name.split(".")[0]
    return plain if plain in KERNELS else "xla"


def figures(chip: str, m: int, k: int = 4096, n: int = 4096) -> dict[str, Any]:
    """What the bars are about: cycles against XLA's bf16 product, spills beside its, bundles of the dequantisation."""
    from lorax_kernels.nf4_matmul.layout_tpu import GROUP_ROWS
    from lorax_kernels.nf4_matmul.pallas_tpu_plan import least_bytes, plan

    found = schedule(chip, m, k, n)
    out: dict[str, Any] = {"chip": chip, "m": m, "k": k, "n": n, "schedule": found}
    xla = found["xla"]
    for op in ("nf4_matmul", "nf4_matmul_t"):
        blocks = plan(op == "nf4_matmul_t", m, k, n, 2, 0, chip)
        assert blocks is not None
        out[op] = {
            "cycles_over_xla": round(found[op]["estimated_cycles"] / xla["estimated_cycles"], 3),
            "spills_beyond_xla": found[op].get("VSTORE:SPILL", 0) - xla.get("VSTORE:SPILL", 0),
            "mxu": found[op].get("MXU", 0) > 0,
            "vmem": blocks.vmem(),
            "bytes_over_least": round(sum(blocks.moved().values()) / least_bytes(m, k, n, 2), 3),
        }
    # The program is one loop over groups of 512 rows, eight tiles of columns wide at most.
    width = next(lanes * 128 for lanes in (8, 7, 6, 5, 4, 3, 2, 1) if n % (lanes * 128) == 0)
    per_thousand = found["nf4_dequantise"]["bundles"] / (GROUP_ROWS * width / 1024)
    out["dequantise_bundles_per_1024"] = round(per_thousand, 3)
    return out


def main(path: str = "kernels/results/tpu.json") -> None:
    from importlib import metadata

    rows = [figures(chip, m) for chip in PODS for m in (2048, 8192)]
    versions = {name: metadata.version(name) for name in ("jax", "libtpu")}
    note = "compiled for these chips and read from the compiler's schedule; nobody ran it there"
    about = {"command": "python -m lorax_kernels.static.tpu", "note": note, "versions": versions}
    Path(path).write_text(json.dumps({**about, "programs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_all(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        main(*sys.argv[1:])
