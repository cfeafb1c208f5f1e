"""What a finished run writes: the thing that was learned, and the report about it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lorax import merge, save_adapter
from lorax.quant import Quantized
from lorax.train.config import ADAPTERS, TrainConfig
from lorax.train.dataset import Dataset
from lorax.train.receipts import Receipt
from lorax.train.step import State
from lorax.tree import map_named, named_leaves
from lorax.weights import Change


def save_result(out: Path, model: Any, params: PyTree, config: TrainConfig) -> Path:
    """Write what was trained: `adapter/` in PEFT's format for factors, else `model/`, a Hugging Face directory.

    LoftQ's factors belong to the quantised base that they were fitted to. After one turn that is what quantising the
    base gives; after more it is the run's own, and is written beside them, as `base/`.

    Returns:
        The folder of what was trained.
    """
    from lorax.models import save_hf

    if config.method in ADAPTERS:
        turns, base = config.loftq, config.base
        if turns > 1:
            save_hf(out / "base", model, base_of(params))
            base = str(out / "base")
        labels = model.config.labels
        save_adapter(
            out / "adapter", params, base_name=base, loftq=turns, labels=labels, regression=model.config.regression
        )
        return out / "adapter"
    save_hf(out / "model", model, merge(params))
    return out / "model"


def base_of(params: PyTree) -> PyTree:
    """An adapted tree without its low-rank changes."""
    return map_named(lambda _, leaf: leaf.base if isinstance(leaf, Change) else leaf, params)


def base_figures(params: PyTree) -> dict[str, Any]:
    """What the base weighs: bytes of all arrays, bits a parameter of the quantised ones (None without any)."""
    leaves = [leaf for _, leaf in named_leaves(base_of(params))]
    packed = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    count = sum(math.prod(leaf.shape) for leaf in packed)
    return {
        "bytes": sum(x.nbytes for leaf in leaves for x in jax.tree.leaves(leaf)),
        "quantised_parameters": count,
        "bits_per_quantised_parameter": round(8 * sum(leaf.nbytes for leaf in packed) / count, 4) if count else None,
    }


def build_report(
    config: TrainConfig,
    data: Dataset,
    rows: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    receipts: list[Receipt],
    state: State,
    saved: Path,
    base: dict[str, Any],
    record: dict[str, Any],
) -> dict[str, Any]:
    """The report of a run, as `report.json` holds it: JSON values only."""
    leaves = jax.tree.leaves(state.trainable)
    return {
        "eval": {"before": evals[0], "after": evals[-1], "majority": data.majority, "history": evals},
        "train": training_figures(rows),
        "adapter": {
            "method": config.method,
            "path": str(saved),
            "parameters": sum(leaf.size for leaf in leaves),
            "bytes": sum(leaf.nbytes for leaf in leaves),
            "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        },
        "base": base,
        "coverage": [receipt.as_json() for receipt in receipts],
        "data": {"name": data.name, "train_items": len(data.train), "eval_items": len(data.held_out)},
        "run": record,
    }


def training_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over the steps. The speed leaves out steps that waited for the compiler, unless all did."""
    warm = [row for row in rows if not row["compiled"]] or rows
    seconds = sum(row["seconds"] for row in warm)
    return {
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "tokens_per_second": round(sum(row["tokens"] for row in warm) / seconds, 2) if seconds else 0.0,
        "loss": {"first": rows[0]["loss"], "last": rows[-1]["loss"]} if rows else None,
    }
