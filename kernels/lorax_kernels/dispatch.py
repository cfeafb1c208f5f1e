"""One table: operation x platform -> implementation, which was chosen, and why the others were refused.

from lorax_kernels import explain, force, target
print(explain("nf4_matmul", Shapes(m=16, k=4096, n=4096, dtype="bfloat16")))
with force("xla"):                    # or the environment: LORAX_KERNELS=xla, LORAX_KERNELS=nf4_matmul=pallas
    ...
with target("tpu", "v5e"):            # what a program is traced for, when it is compiled ahead of time
    ...
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

ENVIRONMENT = "LORAX_KERNELS"

# A reason against a backend, or None: (op, shapes, chip) -> reason.
Refusal = Callable[[str, "Shapes", str], "str | None"]


@dataclass(frozen=True)
class Shapes:
    """What decides a choice: x [m, k] @ W [k, n] in a dtype; the rank of the low-rank term, 0 without one.

    groups, total: of many adapters in one product, how many groups the m rows form, and the sum of all ranks stored;
    `rank` is then the bound on each.
    split: whether the compiler splits the program over several devices, known where the operation is lowered.
    """

    m: int
    k: int
    n: int
    dtype: str = "float32"
    block_size: int = 64
    rank: int = 0
    groups: int = 0
    total: int = 0
    split: bool = False


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    name: what `force` and the environment call it.
    platforms: the JAX platforms it runs on; empty for all.
    ops: the operations it implements.
    refuse: why it does not serve a case, or None.
    broken: why it cannot be loaded here, or None; asked once, and a reason is shown as a warning.
    slower: why a later row is the better choice for a case that this one could serve, or None; not asked when forced.
    """

    name: str
    platforms: tuple[str, ...]
    ops: tuple[str, ...]
    refuse: Refusal
    broken: Callable[[], str | None]
    slower: Refusal = lambda op, shapes, chip: None


@dataclass(frozen=True)
class Choice:
    """Which backend serves a case, and why each other one does not."""

    op: str
    shapes: Shapes
    platform: str
    chip: str
    chosen: str
    reason: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} {self.shapes} on {self.platform} {self.chip}".rstrip(), f"  {self.chosen}: {self.reason}"]
        return "\n".join([*lines, *(f"  not {name}: {why}" for name, why in self.refused.items())])


_TABLE: list[Backend] = []
_FORCED: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("lorax_kernels_forced")
_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("lorax_kernels_target", default=None)
_TOLD: set[str] = set()


def register(backend: Backend) -> None:
    """Add a row; earlier rows are preferred."""
    _TABLE.append(backend)


def backends(op: str) -> list[Backend]:
    """The rows that implement an operation, in order of preference."""
    return [backend for backend in _TABLE if op in backend.ops]


@contextlib.contextmanager
def force(name: str, op: str | None = None) -> Iterator[None]:
    """Use one backend, for one operation or for all, whatever the table would choose.

    Raises:
        ValueError: no backend or operation of that name; and later, where the operation is traced, if it cannot serve
            the case.
    """
    _known(name)
    if op is not None:
        _known_op(op)
    token = _FORCED.set({**_FORCED.get({}), op or "*": name})
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextlib.contextmanager
def target(platform: str, chip: str = "") -> Iterator[None]:
    """Say what a program is traced for when it is compiled for another machine than this one.

    platform: `"tpu"`, `"cuda"` or `"cpu"`. chip: `"v5e"`, `"v5p"`, `"v6e"`; `"sm_80"`, `"sm_90"`, `"sm_100"`.
    """
    token = _TARGET.set((platform, chip))
    try:
        yield
    finally:
        _TARGET.reset(token)


def current_target() -> tuple[str, str]:
    """(platform, chip): what `target` says, else the default device."""
    told = _TARGET.get()
    if told is not None:
        return told
    platform = jax.default_backend()
    return ("cuda" if platform == "gpu" else platform), _chip(jax.devices()[0])


def _chip(device: Any) -> str:
    kind = device.device_kind.lower()
    if device.platform == "tpu":
        names = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "7x": "tpu7x"}
        return next((chip for word, chip in names.items() if word in kind), kind)
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else ""


def explain(op: str, shapes: Shapes, platform: str | None = None, chip: str = "") -> Choice:
    """Which backend serves a case, and why the others do not.

    Args:
        op: `"nf4_dequantise"`, `"nf4_matmul"`, `"nf4_matmul_t"`, `"multi_lora"` or `"multi_lora_grad"`.
        shapes: the case.
        platform, chip: as in `target`; by default what the program is traced for.

    Raises:
        ValueError: an unknown operation, or a forced backend that cannot serve the case.
    """
    _known_op(op)
    rows = backends(op)
    if platform is None:
        platform, chip = current_target()
    forced = forced_backend(op)
    refused: dict[str, str] = {}
    chosen: str | None = None
    for backend in rows:
        why = (
            f"{forced} is forced"
            if forced not in (None, backend.name)
            else _why_not(backend, op, shapes, platform, chip, forced is not None)
        )
        if why is not None:
            refused[backend.name] = why
        elif chosen is None:
            chosen = backend.name
        else:
            refused[backend.name] = f"{chosen} comes first in the table"
    if chosen is None:
        assert forced is not None, "the plain JAX row serves everything"
        raise ValueError(f"{op}: {forced} is forced and cannot serve {shapes} on {platform}: {refused[forced]}")
    return Choice(op, shapes, platform, chip, chosen, "forced" if forced else "first that serves the case", refused)


def _why_not(backend: Backend, op: str, shapes: Shapes, platform: str, chip: str, forced: bool) -> str | None:
    if backend.platforms and platform not in backend.platforms:
        return f"is for {', '.join(backend.platforms)}"
    reason = backend.broken()
    if reason is not None:
        _tell(backend.name, reason)
        return reason
    return backend.refuse(op, shapes, chip) or (None if forced else backend.slower(op, shapes, chip))


def _tell(name: str, reason: str) -> None:
    """A backend of this platform that does not load is said once, visibly."""
    if name not in _TOLD:
        _TOLD.add(name)
        warnings.warn(f"lorax_kernels: the {name} kernels are not used: {reason}", RuntimeWarning, stacklevel=2)


def forced_backend(op: str) -> str | None:
    """The backend that `force` or the environment names for an operation."""
    forced = _FORCED.get({})
    if op in forced or "*" in forced:
        return forced.get(op, forced.get("*"))
    for part in filter(None, os.environ.get(ENVIRONMENT, "").split(",")):
        key, _, value = part.rpartition("=")
        if key and _known_op(key) != op:
            continue
        return _known(value)
    return None


def _known_op(op: str) -> str:
    known = sorted({name for backend in _TABLE for name in backend.ops})
    if op not in known:
        raise ValueError(f"{op!r} is no operation of the table; choose one of {', '.join(known)}")
    return op


def _known(name: str) -> str:
    names = [backend.name for backend in _TABLE]
    if name not in names:
        raise ValueError(f"{name!r} is no backend; choose one of {', '.join(names)} (force, or {ENVIRONMENT})")
    return name
