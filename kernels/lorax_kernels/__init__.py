"""Kernels for structured weights: a plain JAX meaning for each operation, and backends for TPU, NVIDIA and CPU.

Depends on JAX alone (and on jax-triton where there is an NVIDIA GPU).
"""

from lorax_kernels import backends  # noqa: F401  (registers the rows of the table)
from lorax_kernels.dispatch import Shapes, explain, force, target

__all__ = ["Shapes", "explain", "force", "target"]
