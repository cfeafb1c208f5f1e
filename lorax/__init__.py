"""lorax: fine-tuning, what happens to the weights?

The whole public API is re-exported here; there is no second route. `lorax.models` (base models, needs Flax) and
`lorax.train` are imported on their own.

Names are resolved on first use, so that the command line answers `--help` without importing JAX.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorax.errors import LoraxError

if TYPE_CHECKING:
    from lorax.adapt import adapt
    from lorax.bank import Bank
    from lorax.combine import Extracted, combine, extract_lora
    from lorax.dropout import dropout
    from lorax.io.peft import load_adapter, save_adapter
    from lorax.lift import lift
    from lorax.masks import mask, optimizer
    from lorax.multi import (
        adapter_ids,
        adapter_names,
        add_adapter,
        bank_optimizer,
        bank_step,
        compact_bank,
        remove_adapter,
        replace_adapter,
        reset_adapter,
        select,
        stack,
        unstack,
    )
    from lorax.quant import Quantized, QuantSpec, dequantize, loftq, quantize, requantize
    from lorax.rebase import rebase
    from lorax.report import report
    from lorax.spec import LoraSpec
    from lorax.tree import attach, extract, join, merge, split, unmerge
    from lorax.variants.dora import Dora
    from lorax.variants.lora_fa import FrozenA
    from lorax.variants.loraplus import lora_plus
    from lorax.variants.vera import Vera
    from lorax.weights import Axes, Change, Concat, Full, LowRank

# name -> the module that defines it
_HOME = {
    "Axes": "weights",
    "Bank": "bank",
    "Change": "weights",
    "Concat": "weights",
    "Dora": "variants.dora",
    "Extracted": "combine",
    "FrozenA": "variants.lora_fa",
    "Full": "weights",
    "LoraSpec": "spec",
    "LowRank": "weights",
    "QuantSpec": "quant",
    "Quantized": "quant",
    "Vera": "variants.vera",
    "adapt": "adapt",
    "adapter_ids": "multi",
    "adapter_names": "multi",
    "add_adapter": "multi",
    "attach": "tree",
    "bank_optimizer": "multi",
    "bank_step": "multi",
    "combine": "combine",
    "compact_bank": "multi",
    "dequantize": "quant",
    "dropout": "dropout",
    "extract": "tree",
    "extract_lora": "combine",
    "join": "tree",
    "lift": "lift",
    "load_adapter": "io.peft",
    "loftq": "quant",
    "lora_plus": "variants.loraplus",
    "mask": "masks",
    "merge": "tree",
    "optimizer": "masks",
    "quantize": "quant",
    "rebase": "rebase",
    "remove_adapter": "multi",
    "replace_adapter": "multi",
    "report": "report",
    "requantize": "quant",
    "reset_adapter": "multi",
    "save_adapter": "io.peft",
    "select": "multi",
    "split": "tree",
    "stack": "multi",
    "unmerge": "tree",
    "unstack": "multi",
}

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Bank",
    "Change",
    "Concat",
    "Dora",
    "Extracted",
    "FrozenA",
    "Full",
    "LoraSpec",
    "LoraxError",
    "LowRank",
    "QuantSpec",
    "Quantized",
    "Vera",
    "adapt",
    "adapter_ids",
    "adapter_names",
    "add_adapter",
    "attach",
    "bank_optimizer",
    "bank_step",
    "combine",
    "compact_bank",
    "dequantize",
    "dropout",
    "extract",
    "extract_lora",
    "join",
    "lift",
    "load_adapter",
    "loftq",
    "lora_plus",
    "mask",
    "merge",
    "optimizer",
    "quantize",
    "rebase",
    "remove_adapter",
    "replace_adapter",
    "report",
    "requantize",
    "reset_adapter",
    "save_adapter",
    "select",
    "split",
    "stack",
    "unmerge",
    "unstack",
]


class _Door(ModuleType):
    """This package: public names are imported when they are first asked for, and stay what they are.

    Importing the module `lorax.adapt` makes Python bind it to the package as `adapt`; that name is the function's.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'lorax' has no attribute {name!r}")
        value = getattr(import_module(f"lorax.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Door
