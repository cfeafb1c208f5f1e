"""Quantised weights: putting the leaf of `lorax.quantized` into a tree, and LoftQ's better start over it."""

from lorax.quant.loftq import fit_factors, loftq, merge_trained
from lorax.quant.spec import QuantSpec
from lorax.quant.tree import dequantize, quantize, quantize_weight, requantize
from lorax.quantized import Quantized

__all__ = [
    "QuantSpec",
    "Quantized",
    "dequantize",
    "fit_factors",
    "loftq",
    "merge_trained",
    "quantize",
    "quantize_weight",
    "requantize",
]
