"""Products with 4-bit weights: one meaning (`xla`), backends for TPU and NVIDIA, chosen by the table in `dispatch`."""

from lorax_kernels.nf4_matmul.api import lora_matmul, matmul, serves

__all__ = ["lora_matmul", "matmul", "serves"]
