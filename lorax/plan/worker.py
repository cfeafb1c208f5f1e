"""The compiled level, in a process of its own: JSON of a job in, the compiler's verdict out.

`python -m lorax.plan.worker < request.json` writes one JSON object as the last line of standard output. It is a
process because a compiler for another machine changes the one it is loaded into, and may end it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import Any

# What a refusal says of itself: "Ran out of memory ... Used 25.49G of 15.75G hbm", or, before anything is placed,
# "... HLO temporaries (27.42G) exceeds available HBM (15.75G)".
_USED = (
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# An H100 SXM as its driver describes it. XLA compiles for what stands here.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> int:
    request = json.load(sys.stdin)
    try:
        answer = compile_job(request)
    except Exception as error:  # whatever a foreign compiler raises becomes the parent's one line
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(answer), flush=True)
    return 0


def compile_job(request: dict[str, Any]) -> dict[str, Any]:
    """Compile the step of a job for its chips; an answer with `refused` where the compiler says it does not fit."""
    from lorax.models.config import ModelConfig, RopeScaling
    from lorax.plan.hlo import collectives, summary
    from lorax.plan.job import Job, trees
    from lorax.plan.step import lowered_step
    from lorax.plan.target import parse_target
    from lorax_kernels import target as traced_for

    # JSON has lists where a configuration has tuples.
    config: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in request["base"].items()
    }
    if config["rope_scaling"]:
        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    where = parse_target(request["target"])
    others = {key: value for key, value in request.items() if key not in ("base", "target", "targets", "hlo")}
    job = Job(ModelConfig(**config), target=where, targets=tuple(request["targets"]), **others)
    mesh = _mesh(job)
    began = time.perf_counter()
    with traced_for(where.chip.platform, where.chip.kernels):
        lowered = lowered_step(job, trees(job, mesh))
    middle = time.perf_counter()
    seconds = {"lower": round(middle - began, 1)}
    try:
        compiled = lowered.compile()
    except Exception as error:
        found = next(filter(None, (pattern.search(str(error)) for pattern in _USED)), None)
        if found is None:
            raise
        used = float(found[1]) * _UNITS[found[2]]
        seconds["compile"] = round(time.perf_counter() - middle, 1)
        return {"refused": True, "bytes": used, "capacity": float(found[3]) * _UNITS[found[4]], "seconds": seconds}
    seconds["compile"] = round(time.perf_counter() - middle, 1)
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    text = compiled.as_text()
    if request.get("hlo"):
        with open(request["hlo"], "w", encoding="utf-8") as file:
            file.write(text)
    found = collectives(text, where.chips)
    return {
        "refused": False,
        "bytes": sum(parts.values()),
        "parts": parts,
        "flops": float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        "collectives": summary(found),
        "wire": sum(one.times * one.bytes for one in found),
        "kernels": sum(
            text.count(f'custom_call_target="{name}"') for name in ("tpu_custom_call", "triton_kernel_call")
        ),
        "seconds": seconds,
        "versions": _versions(),
    }


def _mesh(job: Any) -> Any:
    """The job's mesh over the devices of a machine that is not here."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    where = job.target
    if where.chip.platform == "tpu":
        # The smallest slice that has a topology is a host of four; one chip is one of those.
        name = str(where) if where.chips > 1 else f"{where.chip.name}:{'x'.join(['2', '2', '1'][: len(where.shape)])}"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        shape = where.shape if len(where.shape) == 2 else (1, *where.shape)
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="x".join(map(str, (*shape, 1)))
        )
    devices = np.array(topology.devices[: where.chips])
    return Mesh(devices.reshape(tuple(job.mesh.values())), tuple(job.mesh))


def _versions() -> dict[str, str]:
    from importlib import metadata

    out = {}
    for name in ("jax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = ""
    return {name: version for name, version in out.items() if version}


if __name__ == "__main__":
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sys.exit(main())
