"""What a merge costs: the rounding of each merged weight, and what it does to the outputs on a probe batch.

    error   ||M - (W + s A B)||_F / ||W + s A B||_F       M the merged weight in its dtype, the sum in float64
    lost    the same distance over ||s A B||_F: how much of the change rounding swallowed
    outputs max |f(merged) - f(adapted)|, beside max |f(adapted)|

A dtype of p bits rounds every weight by about 2^-p, whatever the change: a small change over a bfloat16 base can be
lost to a large part while `error` looks harmless, which is why both are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.tree import map_named, named_leaves
from lorax.weights import Change, LowRank, dense


@dataclass(frozen=True)
class MergeAudit(Mapping[str, float]):
    """Path -> relative error of the merged weight, for every changed weight.

    errors: that mapping.
    lost: path -> the error over the size of the change; None where the change is no sum, infinite where it is zero.
    difference, largest: of the outputs on the probe batch, and the largest output; None without a probe.
    """

    errors: Mapping[str, float]
    lost: Mapping[str, float | None] = field(default_factory=dict)
    difference: float | None = None
    largest: float | None = None

    def __getitem__(self, path: str) -> float:
        return self.errors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.errors)

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def worst(self) -> str | None:
        """The path with the largest error; None where nothing is changed."""
        return max(self.errors, key=lambda path: _rank(self.errors[path]), default=None)

    @property
    def relative_difference(self) -> float | None:
        """The largest difference of an output over the largest output; None without a probe."""
        if self.difference is None or self.largest is None:
            return None
        return self.difference / self.largest if self.largest else math.inf if self.difference else 0.0

    def check(self, tolerance: float) -> None:
        """Refuse a merge that is worse than this.

        Args:
            tolerance: the largest relative error of a weight, and of the outputs, that will do.

        Raises:
            LoraxError: names the worst weight, or the outputs.
        """
        way_out = "merge into a wider dtype, keep the adapter apart, or raise the tolerance"
        if self.worst is not None and not self.errors[self.worst] <= tolerance:
            raise LoraxError(
                f"{self.worst}: merging costs a relative error of {self.errors[self.worst]:.3g}, above the tolerance "
                f"of {tolerance:.3g}; {way_out}"
            )
        found = self.relative_difference
        if found is not None and not found <= tolerance:
            raise LoraxError(
                f"merging moves an output of the probe batch by {self.difference:.3g}, {found:.3g} of the largest, "
                f"above the tolerance of {tolerance:.3g}; {way_out}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is null."""
        weights = {
            path: {"error": _finite(error), "lost": _finite(self.lost.get(path))} for path, error in self.errors.items()
        }
        return {
            "worst": self.worst,
            "worst_error": _finite(self.errors[self.worst]) if self.worst is not None else None,
            "largest_output_difference": _finite(self.difference),
            "largest_output": _finite(self.largest),
            "relative_output_difference": _finite(self.relative_difference),
            "weights": weights,
        }


def audit(params: Any, merged: Any, fn: Callable[..., Any] | None = None, args: Sequence[Any] = ()) -> MergeAudit:
    """Compare a merged tree with the adapted one that it stands for.

    Args:
        params: the adapted tree.
        merged: the plain tree, in whatever dtype it will be kept; quantised leaves count with the values they hold.
        fn: `fn(params, *args) -> outputs`, such as a model's `apply`; without it no outputs are compared. Both trees
            go through it in the arithmetic of the adapted one, so that what differs is the weights.
        args: the probe batch.

    Raises:
        LoraxError: an adapter without its base.
    """
    plain = dict(named_leaves(merged))
    errors: dict[str, float] = {}
    lost: dict[str, float | None] = {}
    for path, leaf in named_leaves(params):
        if isinstance(leaf, Change):
            errors[path], lost[path] = _of(leaf, plain[path])
    if fn is None:
        return MergeAudit(errors, lost)
    return MergeAudit(errors, lost, *_outputs(params, merged, fn, args))


def _outputs(params: Any, merged: Any, fn: Callable[..., Any], args: Sequence[Any]) -> tuple[float, float]:
    from lorax.lift import lift

    same = map_named(lambda _, leaf, new: _as(dense(new), leaf.dtype), params, merged)
    lifted = jax.jit(lift(fn))
    want, have = (jax.tree.leaves(lifted(tree, *args)) for tree in (params, same))
    pairs = [(np.asarray(w, np.float64), np.asarray(h, np.float64)) for w, h in zip(want, have, strict=True)]
    difference = max((float(np.max(np.abs(w - h))) for w, h in pairs if w.size), default=0.0)
    return difference, max((float(np.max(np.abs(w))) for w, _ in pairs if w.size), default=0.0)


def _as(value: Any, dtype: Any) -> Any:
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _of(leaf: Change, merged: Any) -> tuple[float, float | None]:
    """The error over the weight, and over the change."""
    change = leaf.low_rank()
    base = np.asarray(dense(leaf.base), np.float64)
    if change is not None:
        delta = exact_delta(change)
        exact, size = base + delta, float(np.linalg.norm(delta))
    else:
        # A change that is no sum has its float32 form as the measure: what is lost is the rounding to a narrower dtype.
        wide = leaf.with_base(jnp.asarray(dense(leaf.base)).astype(jnp.float32))
        exact, size = np.asarray(dense(wide), np.float64), None
    distance = float(np.linalg.norm(np.asarray(dense(merged), np.float64) - exact))
    norm = float(np.linalg.norm(exact))
    error = distance / norm if norm else (math.inf if distance else 0.0)
    if size is None:
        return error, None
    return error, distance / size if size else (math.inf if distance else 0.0)


def exact_delta(leaf: LowRank) -> np.ndarray:
    """scale * A B in float64 on the host, in the weight's shape."""
    s, i = len(leaf.axes.stack), len(leaf.axes.inputs)
    a, b = np.asarray(leaf.A, np.float64), np.asarray(leaf.B, np.float64)
    stack, ins, outs = a.shape[:s], a.shape[s : s + i], b.shape[s + 1 :]
    ab = a.reshape(*stack, -1, leaf.rank) @ b.reshape(*stack, leaf.rank, -1)
    scale = np.asarray(leaf.scale, np.float64)
    ab = ab * scale.reshape(*scale.shape, *([1] * (ab.ndim - scale.ndim)))
    return np.transpose(ab.reshape(*stack, *ins, *outs), np.argsort(leaf.axes.order))


def _rank(error: float) -> float:
    """NaN is the worst of all."""
    return math.inf if math.isnan(error) else error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
