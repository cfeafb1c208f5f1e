"""Kernels for structured weights: a plain JAX meaning for each operation, and backends for TPU, NVIDIA and CPU.

Depends on JAX alone (and on jax-triton where there is an NVIDIA GPU).
"""
