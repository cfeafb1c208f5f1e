"""A plan as one answer: both levels side by side, the verdict, and what to change. Plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax.plan.advice import advice
from lorax.plan.closed import Estimate, estimate
from lorax.plan.compiled import Compiled, compile_step
from lorax.plan.job import Job


def answer(name: str, job: Job, with_compiler: bool = False, hlo: str | None = None) -> dict[str, Any]:
    """Everything that `lorax plan --json` prints.

    The verdict is the compiler's where it was asked, else the closed form's.

    Args:
        name: of the base, as it was given.
        job: the step.
        with_compiler: ask the chip's compiler as well.
        hlo: a file for the compiled program.
    """
    found = estimate(job)
    real = compile_step(job, hlo) if with_compiler else None
    capacity = (real.capacity if real else None) or job.target.chip.capacity
    needed = real.bytes if real else found.chip_total
    fits = needed <= capacity and not (real and real.refused)
    out: dict[str, Any] = {
        "base": name,
        "method": job.method,
        "rank": job.rank if job.low_rank else None,
        **({"variant": job.variant} if job.low_rank and job.variant != "lora" else {}),
        **({"adapters": job.adapters} if job.mixed else {}),
        "tokens": {"batch": job.batch, "seq": job.seq},
        "target": str(job.target),
        "chips": job.target.chips,
        "mesh": job.mesh,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "per_chip": {
            **found.per_chip,
            "bytes": round(needed),
            "closed": found.chip_total,
            "capacity": round(capacity),
            "spare": round(capacity - needed),
        },
        "activations": found.activations,
        "fits": fits,
        "flops": found.flops,
        "wire": {**found.wire, "total": sum(found.wire.values())},
        "advice": [] if fits else advice(job, needed, capacity),
    }
    if real is not None:
        out["compiled"] = dataclasses.asdict(real)
        out["difference"] = _difference(found, real)
    return out


def _difference(found: Estimate, real: Compiled) -> dict[str, float]:
    """Closed form over compiler, minus one."""
    out = {"memory": found.chip_total / real.bytes - 1}
    if real.wire:
        out["wire"] = sum(found.wire.values()) / real.wire - 1
    return {what: round(value, 4) for what, value in out.items()}
