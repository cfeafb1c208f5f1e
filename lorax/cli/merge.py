"""`lorax merge`: base + adapter as one model that any Hugging Face reader loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorax.cli.output import print_json, print_table
from lorax.cli.source import Source, find, open_model
from lorax.errors import LoraxError

# Weights that a person is shown.
WORST = 5


@dataclass(frozen=True)
class Args:
    """Add an adapter to its base for good and write a Hugging Face safetensors directory.

    Example: lorax merge --adapter runs/medical-lora --out merged
    """

    adapter: str
    """A run's folder or an adapter's."""
    out: str
    """The directory to write; it must not exist."""
    base: str | None = None
    """The base model; by default the one that the adapter was trained on."""
    into: Literal["original", "dequantized", "requantized"] = "original"
    """Of a QLoRA run: add what training changed to the base as its file has it, to the dequantised 4-bit base (what
    training saw), or to that and quantise the sum again."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights that are written; by default that of the adapter's run."""
    audit: bool = False
    """Tell what merging costs: the relative error of each weight in the dtype that is written, and the largest
    difference of a logit on a probe batch."""
    tolerance: float | None = None
    """Audit, and write nothing if a relative error is above this: of a weight, or of the logits over the largest."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        self._check_settings()
        out = Path(self.out)
        if out.exists():
            raise LoraxError(f"{out}: exists already; choose another --out")
        source = find(self.base, self.adapter)
        if source.adapter is None:
            raise LoraxError(f"{self.adapter}: that run trained whole weights; {source.base} is already one model")
        original = self._original(source)
        from lorax.models import save_hf

        model, params = open_model(source, packed=self.into != "original" or source.loftq)
        self._check(params, original is not None)
        tree, losses = _merged(params, self.into, original, self.dtype)
        found = self._audited(model, params, tree, original is not None)
        save_hf(out, model, tree)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        report = {"out": str(out), "base": source.base, "adapter": str(source.adapter), "bytes": size}
        if losses:
            mean = sum(losses.values()) / len(losses)
            worst = max(losses, key=losses.__getitem__)
            report["requantized"] = {"mean_loss": mean, "worst_loss": losses[worst], "worst": worst, "losses": losses}
        if found is not None:
            report["audit"] = found.as_dict()
        if self.json:
            print_json(report | {"into": self.into})
            return
        print(f"{source.base} + {source.adapter} -> {out} ({size / 1e6:,.1f} MB)")
        if losses:
            print(
                f"rounding to 4 bits again moved the weights by {mean:.2f} times the change on average, "
                f"{losses[worst]:.2f} times at worst ({worst}): 0 would keep all of it"
            )
        if found is not None:
            _show(found)

    def _check_settings(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise LoraxError(f"--tolerance {self.tolerance}: must be a number of at least 0")
        if self.dtype is not None and self.into == "requantized":
            raise LoraxError(f"--dtype {self.dtype}: --into requantized writes 4 bits; leave one of them out")

    def _audited(self, model: Any, params: Any, tree: Any, refitted: bool) -> Any:
        """What merging costs, if that is asked for. refitted: LoftQ's start was taken off, so the sum is another one.

        Raises:
            LoraxError: it costs more than --tolerance.
        """
        if not self.audit and self.tolerance is None:
            return None
        if refitted:
            raise LoraxError(
                "--audit: --into original leaves LoftQ's start out, so the merged model is not the adapted one to "
                "begin with; audit --into dequantized or requantized"
            )
        from lorax.audit import audit

        found = audit(params, tree, model.apply, (probe(model),))
        if self.tolerance is not None:
            found.check(self.tolerance)
        return found

    def _original(self, source: Source) -> Any:
        """The files of the base before it was quantised, where LoftQ's start must be taken off again; else None."""
        if self.into != "original" or not source.loftq:
            return None
        if source.original is None:
            raise LoraxError(
                f"{self.adapter}: LoftQ fitted the factors to its own quantised base, and the run that knows what that "
                "was made from is not here; take --into dequantized or requantized"
            )
        from lorax.models import Original

        return Original(source.original, source.dtype)

    def _check(self, params: Any, known: bool) -> None:
        """Whether --into makes sense for the base that was loaded. known: what it was quantised from is at hand."""
        from lorax.quant import Quantized
        from lorax.tree import named_leaves
        from lorax.weights import Change

        changed = [leaf for _, leaf in named_leaves(params) if isinstance(leaf, Change)]
        packed = any(isinstance(leaf.base, Quantized) for leaf in changed)
        if packed and self.into == "original" and not known:
            raise LoraxError(
                f"{self.adapter}: its base is a file in 4 bits, and there is no other original; "
                "take --into dequantized or requantized"
            )
        if not packed and self.into != "original":
            raise LoraxError(f"--into {self.into}: {self.adapter} was trained over a base that is not quantised")


def probe(model: Any) -> Any:
    """The batch on which the logits are compared: int32 (4, 32), of tokens drawn once and for all."""
    import numpy as np

    length = min(32, model.config.max_length)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (4, length)).astype(np.int32)


def _show(found: Any) -> None:
    """The weights that lose most, and the logits."""
    ranked = sorted(found, key=lambda path: -found[path])[:WORST]
    lost = {path: found.lost[path] for path in ranked}
    rows = [(path, f"{found[path]:.2e}", "-" if lost[path] is None else f"{lost[path]:.2e}") for path in ranked]
    print_table(("weight", "relative error", "part of the change"), rows, "what merging costs, worst first")
    print(
        f"largest difference of a logit: {found.difference:.3g}, where the largest logit is {found.largest:.3g} "
        f"({found.relative_difference:.2e} of it)"
    )


def _merged(params: Any, into: str, original: Any, dtype: str | None) -> tuple[Any, dict[str, float]]:
    """The tree to save, and what quantising again costs each weight."""
    from lorax import merge, requantize
    from lorax.quant import merge_trained

    if original is not None:
        tree = merge_trained(params, original)
        return (tree if dtype is None else merge(tree, dtype=dtype)), {}
    return requantize(params) if into == "requantized" else (merge(params, dtype=dtype), {})
