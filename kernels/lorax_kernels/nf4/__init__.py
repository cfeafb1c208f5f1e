"""NF4 and its neighbours: arrays in blocks of 4 or 8 bits, exact to the bit with bitsandbytes."""

from lorax_kernels.nf4.array import QuantizedArray
from lorax_kernels.nf4.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from lorax_kernels.nf4.dequantize import dequantize, resolve_scales
from lorax_kernels.nf4.formats import FORMATS
from lorax_kernels.nf4.layouts import canonical, for_platform, to_tpu
from lorax_kernels.nf4.lookup import take
from lorax_kernels.nf4.quantize import quantize

__all__ = [
    "FORMATS",
    "QuantizedArray",
    "canonical",
    "dequantize",
    "for_platform",
    "from_bitsandbytes",
    "quantize",
    "resolve_scales",
    "take",
    "to_bitsandbytes",
    "to_tpu",
]
