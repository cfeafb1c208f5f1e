"""Quantised weights: a leaf of the tree (`lorax.quantized`), putting it there (`tree`), and a better start over it (`loftq`)."""

from lorax.quantized import Quantized
from lorax.quant.loftq import loftq
from lorax.quant.tree import dequantize, quantize, quantize_weight, requantize

__all__ = ["Quantized", "dequantize", "loftq", "quantize", "quantize_weight", "requantize"]
