"""Joining: which process this is, out of how many, and the mesh over all their devices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from lorax.errors import LoraxError
from lorax.sharding import mesh_sizes

# Seconds after which a process that no longer answers counts as lost, and the others end as well.
HEARTBEAT = 60


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: int = 300,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Join the other processes. Call it before anything else of JAX, in every process, once.

    Every process runs the same program. What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and else from what JAX knows of its surroundings: TPU pods, GKE, Slurm, Open MPI.

    Args:
        coordinator: host:port of process 0, reachable from all others.
        processes: how many there are.
        process_id: this one's number, from 0.
        patience: seconds to wait for the others.
        heartbeat: seconds after which a silent process is given up; the others end then.

    Raises:
        LoraxError: nothing says who the others are, or they did not come.

    Example:
        initialize("10.0.0.2:8476", processes=4, process_id=int(os.environ["RANK"]))
    """
    given = _given(coordinator, processes, process_id, os.environ)
    if jax.distributed.is_initialized():
        raise LoraxError("distributed: this process has joined already; call initialize once")
    if any(given.values()) and given["coordinator_address"] is None:
        raise LoraxError("distributed: give the coordinator too, host:port of process 0")
    # Over gloo, a program that begins before the last one's collectives are done mixes its messages with theirs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=patience, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60
        )
    except (ValueError, RuntimeError) as error:
        raise LoraxError(f"distributed: {_reason(error, given, patience)}") from error


def _given(
    coordinator: str | None, processes: int | None, process_id: int | None, env: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments, with what the environment says where they are silent.

    Raises:
        LoraxError: a variable or a number that is none.
    """
    out: dict[str, Any] = {"coordinator_address": coordinator or env.get("JAX_COORDINATOR_ADDRESS")}
    for name, value, variable in (
        ("num_processes", processes, "JAX_NUM_PROCESSES"),
        ("process_id", process_id, "JAX_PROCESS_ID"),
    ):
        text = env.get(variable)
        if value is None and text is not None:
            if not text.isdecimal():
                raise LoraxError(f"{variable}={text}: must be a whole number")
            value = int(text)
        out[name] = value
    total, mine = out["num_processes"], out["process_id"]
    if total is not None and mine is not None and not 0 <= mine < total:
        raise LoraxError(f"process {mine} of {total}: processes are numbered from 0 to {total - 1}")
    return out


def _reason(error: Exception, given: dict[str, Any], patience: int) -> str:
    where = given["coordinator_address"]
    words = " ".join(str(error).split())
    if "DEADLINE_EXCEEDED" in words:
        return f"not all processes reached {where} within {patience} s; is every one started, and the port open?"
    if isinstance(error, ValueError):
        return (
            "nothing here says who the other processes are (no TPU pod, Slurm or MPI was found); give --coordinator, "
            "--processes and --process-id, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if "before" in words and "JAX" in words:
        return "JAX was used already in this process; join before anything is computed"
    return words[:300]


class Lost(LoraxError):
    """Another process is gone. What is left to do is to leave, without the farewell that would wait for it."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context for what all processes do: a collective that fails, since another process is gone, is one line.

    Raises:
        Lost: in the place of the runtime's error, where there are several processes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise Lost(
            f"process {jax.process_index()} of {jax.process_count()}: lost the others ("
            f"{' '.join(str(error).split())[:200]}); start all of them again, with --resume"
        ) from error


def process_index() -> int:
    """This process's number, 0 where there is one alone."""
    return jax.process_index()


def process_count() -> int:
    """How many processes run this program."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def make_mesh(text: str | None, batch: int) -> Mesh:
    """A mesh over the devices of all processes, as near neighbours as the topology allows.

    Args:
        text: sizes by name, `data=4,model=2`; None for as much `data` as the batch has rows, the rest `model`.
        batch: rows of the global batch.

    Raises:
        LoraxError: sizes that do not fit the devices or the batch.

    Example:
        >>> make_mesh(None, batch=1).axis_names
        ('data', 'model')
    """
    devices = jax.devices()
    sizes = mesh_sizes(text, len(devices), batch)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
