"""It does not fit: what would. Each suggestion is a job of its own whose closed form was computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lorax.plan.closed import estimate
from lorax.plan.job import Job
from lorax.plan.target import Target


def advice(job: Job, bytes_needed: float, capacity: float, most: int = 3) -> list[str]:
    """Changes that make a job fit by the closed form, the least intrusive first; in words.

    Args:
        job: the job that does not fit.
        bytes_needed: of a chip, by whoever says that it does not fit; the closed form is scaled to it.
        capacity: of a chip.
        most: how many to return.
    """
    if bytes_needed <= capacity:
        return []
    factor = bytes_needed / max(estimate(job).chip_total, 1)
    found = []
    for words, other in _changes(job):
        total = factor * estimate(other).chip_total
        if total <= capacity:
            found.append(f"{words}: {total / 1e9:.1f} GB a chip")
            if len(found) == most:
                break
    return found or ["no single change fits it: take a larger slice, or a smaller base"]


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    change = dataclasses.replace
    if not job.remat:
        yield "leave --no-remat out", change(job, remat=True)
    if job.method == "full":
        yield "--method lora", change(job, method="lora")
    if job.method in ("full", "lora"):
        yield "--method qlora", change(job, method="qlora")
    if job.method == "multi-lora":
        yield "--method multi-qlora", change(job, method="multi-qlora")
    for model in (2, 4, 8, 16):
        mesh = {"data": job.target.chips // model, "model": model}
        whole = job.target.chips % model == 0 and job.batch % mesh["data"] == 0
        if whole and model > job.tensor_parts and job.config.num_heads % model == 0:
            yield f"--mesh data={mesh['data']},model={model}", change(job, mesh=mesh)
    if job.optimizer == "adamw" and job.method == "full":
        yield "--optimizer adamw8bit", change(job, optimizer="adamw8bit")
    for batch in (job.batch // 2, job.batch // 4):
        if batch and batch % job.data_parts == 0:
            yield f"--batch {batch}", change(job, batch=batch)
    for adapters in (job.adapters // 2, job.adapters // 4):
        if job.mixed and adapters:
            yield f"--adapters {adapters}", change(job, adapters=adapters)
    for seq in (job.seq // 2, job.seq // 4):
        if seq >= 256:
            yield f"--seq {seq}", change(job, seq=seq)
    for times in (2, 4, 8, 16):
        grown = _larger(job, times)
        if grown is not None:
            yield f"--target {grown.target} --mesh {mesh_text(grown.mesh)}", grown


def _larger(job: Job, times: int) -> Job | None:
    """The same mesh with so many times its tensor parallelism (data while the batch allows), on a larger slice."""
    shape = list(job.target.shape)
    for _ in range(times.bit_length() - 1):
        shape[shape.index(min(shape))] *= 2
    if job.target.chip.platform == "tpu" and max(shape) > 16:
        return None
    mesh = dict(job.mesh)
    left = times
    if job.batch % (job.data_parts * left) == 0 and "data" in mesh:
        mesh["data"] *= left
        left = 1
    mesh["model"] = mesh.get("model", 1) * left
    if job.config.num_heads % mesh["model"]:
        return None
    return dataclasses.replace(job, target=Target(job.target.chip, tuple(shape)), mesh=mesh)


def mesh_text(mesh: dict[str, int]) -> str:
    """`data=4,model=4`."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())
