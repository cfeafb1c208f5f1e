"""The compiled level: the vendor's compiler, asked in a subprocess, on a machine without the chip."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError
from lorax.plan.job import Job

# No compilation of a step has taken a tenth of this.
_PATIENCE = 1800

_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step.

    refused: it will not compile the step, because it needs more memory than the chip has.
    bytes: HBM per chip: arguments, temporaries and results that take no argument's place. If it refused, its own
        figure, which may be that of the temporaries alone.
    parts: those three (empty if it refused).
    flops: as the compiler counts them for one chip: a loop's body once, and kernels not at all.
    collectives: kind -> how many run in a step and the bytes that a chip receives.
    wire: bytes that a chip receives in a step.
    kernels: calls of Pallas or Triton kernels in the program's text.
    seconds: tracing and compiling.
    """

    refused: bool
    bytes: float
    capacity: float | None = None
    parts: dict[str, int] = field(default_factory=dict)
    flops: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    wire: float = 0.0
    kernels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def compile_step(job: Job, hlo: str | None = None) -> Compiled:
    """Compile a job's training step for its chips.

    Args:
        job: what is planned.
        hlo: a file that gets the optimised program as text.

    Raises:
        LoraxError: the compiler is not installed, does not know the topology, or fails for another reason than memory.
    """
    env = _environment(job)
    request: dict[str, Any] = dataclasses.asdict(job)
    request |= {"target": str(job.target), "hlo": hlo}
    command = [sys.executable, "-m", "lorax.plan.worker"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=env, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise LoraxError(f"--compile: the compiler for {job.target} took more than {_PATIENCE} s") from None
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LoraxError(f"--compile: the compiler for {job.target} ended with {done.returncode}: {last}") from None
    if "error" in answer:
        raise LoraxError(f"--compile: {job.target}: {' '.join(answer['error'].split())[:400]}")
    return Compiled(**answer)


def _environment(job: Job) -> dict[str, str]:
    """The environment of the worker, once its compiler is known to be there."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    platform = job.target.chip.platform
    if platform == "any":
        raise LoraxError(
            f"--compile: {job.target} is a size of memory and no chip; name one, such as v5e:4x4 or h100:8"
        )
    if platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise LoraxError("--compile: the TPU compiler is not installed; pip install 'lorax-flax[aot]'")
        return env | _TPU
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise LoraxError(
            "--compile: the CUDA compiler is not installed; pip install 'lorax-flax[aot]', then with the version of "
            "your jax: pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION"
        )
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/bin/ptxas"))
    if found:
        env["PATH"] = f"{found[0].parent}{os.pathsep}{env.get('PATH', '')}"
    return env | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
