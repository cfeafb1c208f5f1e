"""Optimizer state that takes less memory: moments in 8 bit, and state that waits in host memory between steps."""

from lorax.optim.adam8bit import ScaleByAdam8bitState, adamw8bit, scale_by_adam8bit
from lorax.optim.blockwise import Blockwise, dequantize_blockwise, quantize_blockwise
from lorax.optim.offload import offload, offloadable

__all__ = [
    "Blockwise",
    "ScaleByAdam8bitState",
    "adamw8bit",
    "dequantize_blockwise",
    "offload",
    "offloadable",
    "quantize_blockwise",
    "scale_by_adam8bit",
]
