"""What is planned for: a chip, how many of them, and how a mesh is laid over them.

v5e:4x4   v6e:4x4   v5p:4x4x4   v4:2x2x4        a TPU slice by its topology
h100:8    h100:2x8                              GPUs: of one host, or hosts x GPUs
48GB      48GB:4                                any chips with so much memory (closed form alone)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lorax.errors import LoraxError
from lorax.sharding.mesh import mesh_sizes

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """A kind of chip.

    platform: `"tpu"`, `"cuda"`, or `"any"` where only its memory is known.
    capacity: bytes that a program may use: what its compiler says, which is less than what is soldered on.
    dims: how many numbers its topology has.
    kernels: what `lorax_kernels.target` calls it.
    """

    name: str
    platform: str
    capacity: int
    dims: tuple[int, ...]
    kernels: str


# Usable HBM as libtpu's own refusals state it ("Used X of Y hbm"); for the H100 what the driver reports less 1 GiB of
# context.
CHIPS = {
    "v4": Chip("v4", "tpu", int(30.75 * GIB), (3,), "v4"),
    "v5e": Chip("v5e", "tpu", int(15.75 * GIB), (2,), "v5e"),
    "v5p": Chip("v5p", "tpu", int(95.74 * GIB), (3,), "v5p"),
    "v6e": Chip("v6e", "tpu", int(31.25 * GIB), (2,), "v6e"),
    "h100": Chip("h100", "cuda", 84978434048 - GIB, (1, 2), "sm_90"),
}


@dataclass(frozen=True)
class Target:
    """Chips of one kind in a topology."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_target(text: str) -> Target:
    """A target from its name.

    Raises:
        LoraxError: an unknown chip or a malformed topology; says what would do.

    Example:
        >>> parse_target("v5e:4x4").chips
        16
    """
    name, _, topology = text.strip().lower().partition(":")
    memory = re.fullmatch(r"(\d+(?:\.\d+)?)gb", name)
    chip = CHIPS.get(name)
    if memory:
        chip = Chip(name.upper(), "any", int(float(memory[1]) * 1e9), (1, 2), "")
    if chip is None:
        known = ", ".join(CHIPS)
        raise LoraxError(
            f"--target {text}: chip {name!r} is unknown; choose one of {known} (v5e:4x4, h100:8), or its memory (48GB)"
        )
    if not topology and chip.platform != "tpu":
        topology = "1"
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", topology) or topology.count("x") + 1 not in chip.dims:
        example = {"v4": "2x2x4", "v5p": "2x2x1", "h100": "8 or 2x8"}.get(chip.name, "4x4")
        raise LoraxError(f"--target {text}: {topology!r} is no topology of {chip.name}; write {chip.name}:{example}")
    return Target(chip, tuple(map(int, topology.split("x"))))


def parse_mesh(text: str | None, target: Target, batch: int) -> dict[str, int]:
    """Mesh axis -> size over a target's chips, from `data=4,model=4`; see `lorax.sharding.mesh_sizes`.

    Raises:
        LoraxError: a malformed text, an axis that does not exist, or sizes that do not fit the chips or the batch.

    Example:
        >>> parse_mesh(None, parse_target("v5e:4x4"), batch=8)
        {'data': 8, 'model': 2}
    """
    return mesh_sizes(text, target.chips, batch, str(target))
