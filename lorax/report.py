"""`report`: what an adapted tree changes, in counts and bytes, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lorax.bank import Bank
from lorax.quantized import Quantized
from lorax.tree import named_leaves, pick
from lorax.weights import Change, Concat, Full


@dataclass(frozen=True)
class Row:
    """One weight. Counts are of parameters, whatever they are packed into; bytes are of the arrays as they are held."""

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    rank: int | None
    scale: float | None
    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def group(self) -> str:
        """The weight's kind of place: its path without the last name."""
        return self.path.rsplit("/", 1)[0]


@dataclass(frozen=True)
class Report:
    """The rows of all weights, with totals; prints as a table of the weights that train."""

    rows: tuple[Row, ...]

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        return sum(row.frozen for row in self.rows)

    @property
    def trainable_bytes(self) -> int:
        return sum(row.trainable_bytes for row in self.rows)

    @property
    def frozen_bytes(self) -> int:
        return sum(row.frozen_bytes for row in self.rows)

    @property
    def matched(self) -> tuple[str, ...]:
        """The paths of the weights that train."""
        return tuple(row.path for row in self.rows if row.trainable)

    def groups(self) -> dict[str, tuple[int, int]]:
        """Group -> (trainable, frozen) counts."""
        out: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            trainable, frozen = out.get(row.group, (0, 0))
            out[row.group] = (trainable + row.trainable, frozen + row.frozen)
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "trainable": self.trainable,
            "frozen": self.frozen,
            "trainable_bytes": self.trainable_bytes,
            "frozen_bytes": self.frozen_bytes,
            "weights": [vars(row) for row in self.rows if row.trainable],
        }

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "rank", "scale", "trainable", "frozen")
        body = [_cells(row) for row in self.rows if row.trainable]
        table = [head, *body]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        whole = self.trainable + self.frozen
        share = 100 * self.trainable / whole if whole else 0.0
        lines.append(
            f"trains {self.trainable:,} of {whole:,} parameters ({share:.2f}%), "
            f"{self.trainable_bytes:,} bytes beside {self.frozen_bytes:,} frozen"
        )
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    rank = "" if row.rank is None else str(row.rank)
    scale = "" if row.scale is None else f"{row.scale:g}"
    return (row.path, row.kind, str(row.shape), rank, scale, f"{row.trainable:,}", f"{row.frozen:,}")


def report(params: Any) -> Report:
    """What trains in a tree: matched weights, parameter counts and bytes, per weight and per group.

    Args:
        params: an adapted tree, concrete or abstract. The scale of a low-rank change counts as neither.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> params = {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}
        >>> print(lorax.report(lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="kernel", rank=2))))
        weight  kind      shape   rank  scale  trainable  frozen
        kernel  low-rank  (3, 5)  2     16     16         15
        trains 16 of 36 parameters (44.44%), 64 bytes beside 80 frozen
    """
    return Report(tuple(_row(path, leaf) for path, leaf in named_leaves(params)))


_KINDS = {Quantized: "quantised", Full: "full", Concat: "pieces", Bank: "bank"}


def _row(path: str, leaf: Any) -> Row:
    trains, frozen = _arrays(pick(leaf, True)), _held(leaf)
    changed = isinstance(leaf, Change)
    return Row(
        path=path,
        kind=leaf.KIND if changed else _KINDS.get(type(leaf), "frozen"),
        shape=tuple(leaf.shape),
        dtype=_dtype(leaf),
        rank=leaf.rank if changed else None,
        scale=_scale(leaf) if changed else None,
        trainable=sum(_size(x) for x in trains),
        frozen=sum(_size(x) for x in frozen),
        trainable_bytes=sum(_bytes(x) for x in trains),
        frozen_bytes=sum(_bytes(x) for x in frozen),
    )


def _held(leaf: Any) -> list[Any]:
    """What does not train, with quantised weights whole; the scale of a low-rank change counts as neither."""
    if isinstance(leaf, Concat):
        return [x for part in leaf.parts for x in _held(part)]
    if isinstance(leaf, Change):
        # Frozen factors count; a scale is a number, not a weight.
        factors = _arrays(pick(leaf.with_base(None), False))
        return [*_held(leaf.base), *(x for x in factors if x.ndim > len(leaf.axes.stack))]
    return [leaf] if isinstance(leaf, Quantized) else _arrays(pick(leaf, False))


def _dtype(leaf: Any) -> str:
    base = leaf.base if isinstance(leaf, Change) else leaf
    if isinstance(base, Quantized):
        return base.array.format
    return jnp.dtype(leaf.dtype).name if hasattr(leaf, "dtype") else type(leaf).__name__


def _scale(leaf: Change) -> float | None:
    # A scale per layer, or one that is traced or abstract, is no single number; some changes have none.
    scale: Any = getattr(leaf, "scale", None)
    concrete = isinstance(scale, (jax.Array, np.ndarray)) and not isinstance(scale, Tracer)
    return float(scale) if concrete and scale.ndim == 0 else None


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]


def _size(x: Any) -> int:
    return math.prod(x.shape)


def _bytes(x: Any) -> int:
    return x.nbytes if isinstance(x, Quantized) else _size(x) * jnp.dtype(x.dtype).itemsize
