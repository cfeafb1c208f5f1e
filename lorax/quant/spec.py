"""`QuantSpec`: which weights of a base are kept in few bits, and in which format. Plain frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorax.errors import LoraxError
from lorax.paths import Pattern
from lorax.spec import ALL_LINEAR
from lorax_kernels.nf4.codebooks import FOUR_BIT
from lorax_kernels.nf4.formats import BLOCK_SIZES, FORMATS


@dataclass(frozen=True)
class QuantSpec:
    """How a base is quantised while it is loaded: `lorax.models.load(name, quantize=QuantSpec())`.

    Args:
        format: `"nf4"`, `"fp4"`, `"int8"` or `"bf16"`.
        double_quant: scales in 8 bits: 4.127 bits a parameter, else 4.5.
        block_size: parameters that share a scale: 32, 64, 128 or 256.
        targets: patterns as in `LoraSpec`; `"all-linear"` leaves embeddings, norms and the head as they are.

    Raises:
        LoraxError: a value outside these.

    Example:
        >>> QuantSpec(block_size=128).as_json()["format"]
        'nf4'
    """

    format: str = "nf4"
    double_quant: bool = True
    block_size: int = 64
    targets: Pattern | tuple[Pattern, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise LoraxError(f"QuantSpec: format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}")
        if self.block_size not in BLOCK_SIZES:
            raise LoraxError(f"QuantSpec: block_size {self.block_size!r}: choose one of {BLOCK_SIZES}")
        if isinstance(self.targets, Iterable) and not isinstance(self.targets, (str, tuple)):
            object.__setattr__(self, "targets", tuple(self.targets))

    def describe(self) -> str:
        """The format in words."""
        if self.format not in FOUR_BIT:
            return self.format
        return f"{self.format} in blocks of {self.block_size}{', double quantisation' if self.double_quant else ''}"

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON keeps them."""
        targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)  # pyright: ignore
        return dataclasses.asdict(self) | {"targets": targets}
