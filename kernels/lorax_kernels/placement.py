"""How a quantised matrix lies on a mesh, written down where a kernel's call can read it.

A compiled program knows where arrays lie only after it was traced, and libtpu lets no kernel take part in that
decision (`custom_partitioning` is not there on TPUs). So the array itself says it, and a kernel runs under `shard_map`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh, Mesh


@dataclass(frozen=True)
class Placement:
    """A mesh, the axes of it that split the rows of activations, and the axis that splits each stored axis of W.

    mesh: all devices of the program.
    rows: mesh axes over which the rows of x are split (data parallelism).
    core: for each axis of a slice as it is stored (outputs first), a mesh axis or None. An axis that is also in `rows`
        keeps its part of W until the moment of use (FSDP).
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    core: tuple[str | None, ...]

    def as_matrix(self, cut: int) -> Placement:
        """The placement of the same blocks as an (n, k) matrix, whose outputs are the first `cut` stored axes."""

        def joined(names: tuple[str | None, ...]) -> str | None:
            # Axes that become one are split as one only where the first of them is, and no other.
            return names[0] if not any(names[1:]) else None

        return replace(self, core=(joined(self.core[:cut]), joined(self.core[cut:])))

    def split(self, m: int) -> tuple[str, ...]:
        """The axes that split m rows: all of `rows`, or none where they do not divide them."""
        return self.rows if m % self.count(*self.rows) == 0 else ()

    def count(self, *names: str | None) -> int:
        """How many parts these axes make."""
        parts = 1
        for name in names:
            parts *= 1 if name is None else self.mesh.shape[name]
        return parts

    def local(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """The product (m, k) x (k, n) as each device sees it."""
        rows = self.split(m)
        outs, ins = (None if name in rows else name for name in self.core)
        return m // self.count(*rows), k // self.count(ins), n // self.count(outs)
