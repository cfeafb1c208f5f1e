"""`LoraSpec`: which weights change, and how. Plain frozen data, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.paths import Pattern, as_patterns, matches, show
from lorax.variants.table import INITS, SCALINGS, VARIANTS

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSpec:
    """A frozen description of an adaptation.

    Args:
        targets: the weights that get a low-rank change: a pattern, several, or a callable `(path, leaf) -> bool`.
            A string is a glob whose `*` crosses `/`; a compiled regex is a full match; `"all-linear"` is every
            weight that a matmul consumes but embeddings and the head. `()` adapts none.
        rank: the inner size of A B; a mapping pattern -> rank sets it per weight, the first match counts.
        alpha: the numerator of the scale; a mapping works as for rank.
        scaling: `"lora"`: scale = alpha / rank; `"rslora"`: scale = alpha / sqrt(rank) (Kalajdzievski 2023).
        variant: `"lora"`; `"dora"`: lengths and directions apart; `"lora-fa"`: A frozen; `"vera"`: shared random
            factors and trained diagonals (alpha does not matter).
        init: how the factors start. `"gaussian"`, A ~ N(0, 1/fan_in), or `"uniform"`, U(-1, 1) / sqrt(fan_in), with B
            zero; `"eva"`: A from the inputs that `fn` makes of `args`, ranks redistributed. `"pissa"`, `"milora"` (each
            with `-fast`) and `"olora"` take both out of the weight and leave the rest as the base.
        dropout: probability of dropping an input of the low-rank path, where `lorax.dropout` asks for it.
        train_also: weights that train as they are, beside the low-rank changes (patterns as in targets).
        dtype: dtype of the factors; float32 whatever the base is, since bf16 factors with Adam can stop learning.

    Raises:
        LoraxError: a value outside these.

    Example:
        >>> LoraSpec(targets="*/q_proj/kernel", rank=8, alpha=16.0).scale_for("layers/attn/q_proj/kernel")
        2.0
    """

    targets: Pattern | tuple[Pattern, ...] = ALL_LINEAR
    rank: int | Mapping[Any, int] = 16
    alpha: float | Mapping[Any, float] = 32.0
    scaling: str = "lora"
    variant: str = "lora"
    init: str = "gaussian"
    dropout: float = 0.0
    train_also: Pattern | tuple[Pattern, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _one_of("scaling", self.scaling, SCALINGS)
        _one_of("variant", self.variant, VARIANTS)
        _one_of("init", self.init, INITS)
        starts = VARIANTS[self.variant].starts
        if starts is not None and self.init not in starts:
            raise LoraxError(f"LoraSpec: variant={self.variant!r} has its own start; leave init={self.init!r} out")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise LoraxError(f"LoraSpec: dropout must be a probability below 1, not {self.dropout!r}")
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise LoraxError(f"LoraSpec: dtype {self.dtype!r} is not a floating type; use jnp.float32")
        for rank in _values(self.rank):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise LoraxError(f"LoraSpec: rank must be a whole number of at least 1, not {rank!r}")
        for alpha in _values(self.alpha):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise LoraxError(f"LoraSpec: alpha must be a finite number, not {alpha!r}")
        for name in ("targets", "train_also"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, (str, tuple)):
                object.__setattr__(self, name, tuple(value))

    @property
    def target_patterns(self) -> tuple[Pattern, ...]:
        return as_patterns(self.targets)

    @property
    def also_patterns(self) -> tuple[Pattern, ...]:
        return as_patterns(self.train_also)

    def rank_for(self, path: str) -> int:
        """The rank of the weight at a path."""
        return _lookup("rank", self.rank, path)

    def alpha_for(self, path: str) -> float:
        """The alpha of the weight at a path."""
        return float(_lookup("alpha", self.alpha, path))

    def scale_for(self, path: str) -> float:
        """The scale of the weight at a path: alpha / rank, or alpha / sqrt(rank)."""
        return SCALINGS[self.scaling](self.alpha_for(path), self.rank_for(path))


def _values(setting: Any) -> Iterable[Any]:
    return setting.values() if isinstance(setting, Mapping) else (setting,)


def _lookup(name: str, setting: Any, path: str) -> Any:
    if not isinstance(setting, Mapping):
        return setting
    for pattern, value in setting.items():
        if matches(pattern, path):
            return value
    known = ", ".join(show(pattern) for pattern in setting)
    raise LoraxError(f"{path}: no entry of {name}={{{known}}} matches it; add one, or '*' as the last")


def _one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value in allowed:
        return
    tables = {"scaling": SCALINGS, "variant": VARIANTS, "init": INITS}
    home = next((other for other, table in tables.items() if value in table), None)
    hint = f" ({value!r} is a row of {home}: {home}={value!r})" if home else ""
    raise LoraxError(f"LoraSpec: {name}={value!r} is unknown; choose one of {', '.join(sorted(allowed))}{hint}")
