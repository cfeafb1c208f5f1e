"""What a step must cost: its matrix products, counted by hand, so that a measured time has a floor to stand on.

For T tokens, a frozen product of n weights costs 2 n T forward and 2 n T for the gradient of its input; a trained one
2 n T more for its own gradient. Norms, softmax and other element-wise work are not counted: that is the distance to
the floor.
"""

from __future__ import annotations

from typing import NamedTuple

from lorax.models.config import ModelConfig


class Product(NamedTuple):
    """A product (rows, inner) x (inner, columns) and how often a step does it."""

    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times


def linears(c: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of each linear map of one layer."""
    d, f, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def lora_products(c: ModelConfig, batch: int, length: int, rank: int) -> list[Product]:
    """The products of one LoRA step with factors on every linear map of every layer.

    Args:
        c: the model's shape.
        batch, length: of the tokens.
        rank: of the factors.

    Example:
        >>> c = ModelConfig("llama", 49152, 576, 1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)
        >>> round(sum(p.flops for p in lora_products(c, 8, 128, 16)) / 1e12, 2)
        0.61
    """
    tokens, n = batch * length, c.num_layers
    out = []
    for size_in, size_out in linears(c):
        out.append(Product(tokens, size_in, size_out, n))  # x W
        out.append(Product(tokens, size_out, size_in, n))  # dy W^T
        # x A and h B, their inputs' gradients, and the gradients of A and B.
        out += [Product(tokens, size_in, rank, n), Product(tokens, rank, size_out, n)]
        out += [Product(tokens, rank, size_in, n), Product(tokens, size_out, rank, n)]
        out += [Product(size_in, tokens, rank, n), Product(rank, tokens, size_out, n)]
    out += [Product(tokens, c.hidden_size, c.vocab_size, 1), Product(tokens, c.vocab_size, c.hidden_size, 1)]
    # Scores and weighted values of each head, and the gradients of both sides of both.
    heads = n * batch * c.num_heads
    out += [Product(length, c.head_dim, length, 3 * heads), Product(length, length, c.head_dim, 3 * heads)]
    return out


def lora_parameters(c: ModelConfig, rank: int) -> int:
    """How many numbers the factors hold."""
    return c.num_layers * rank * sum(size_in + size_out for size_in, size_out in linears(c))
