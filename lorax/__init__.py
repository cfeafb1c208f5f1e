"""lorax: fine-tuning, what happens to the weights?

The whole public API is re-exported here; there is no second route. `lorax.models` (base models, needs Flax) and
`lorax.train` are imported on their own.
"""

from lorax.adapt import adapt
from lorax.errors import LoraxError
from lorax.io.peft import load_adapter, save_adapter
from lorax.lift import lift
from lorax.masks import mask, optimizer
from lorax.quant import Quantized, QuantSpec, dequantize, loftq, quantize, requantize
from lorax.report import report
from lorax.spec import LoraSpec
from lorax.tree import attach, extract, join, merge, split, unmerge
from lorax.weights import Axes, Concat, Full, LowRank

__version__ = "0.1.0"

__all__ = [
    "Axes",
    "Concat",
    "Full",
    "LoraSpec",
    "LoraxError",
    "LowRank",
    "QuantSpec",
    "Quantized",
    "adapt",
    "attach",
    "dequantize",
    "extract",
    "join",
    "lift",
    "load_adapter",
    "loftq",
    "mask",
    "merge",
    "optimizer",
    "quantize",
    "report",
    "requantize",
    "save_adapter",
    "split",
    "unmerge",
]
