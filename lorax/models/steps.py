"""The decoder as a server steps it: keys and values live with the caller, and linear maps may be changed on their way.

It is the same module as in training; the caller says what attention sees, and what is added to each linear map's
output, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from lorax.models.config import ModelConfig
from lorax.models.model import definition_of
from lorax.models.rope import rotation

# (path in the layer, layer's number, input, output) -> output
Change = Callable[[str, Array, Array, Array], Array]

LINEAR = (
    ("attn", "q_proj"),
    ("attn", "k_proj"),
    ("attn", "v_proj"),
    ("attn", "o_proj"),
    ("mlp", "gate_proj"),
    ("mlp", "up_proj"),
    ("mlp", "down_proj"),
)


@dataclass(frozen=True, eq=False)
class _Changed:
    """A linear map with something done to what it gives."""

    linear: Callable[[Array], Array]
    change: Callable[[Array, Array], Array]

    def __call__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        return self.change(x, self.linear(x))


def through_layers(
    config: ModelConfig,
    params: PyTree,
    ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attending: Callable[[Array, Array, Array, Array], tuple[Array, Any]],
    change: Change,
) -> tuple[Float[Array, "b t d"], Any]:
    """Features of tokens after the final norm, and what attention kept of each layer.

    Args:
        config: the shape; inside `shard_map`, of one device's part.
        params: the weights, a plain nested dict.
        ids, positions: the tokens, and where each stands in its sequence.
        attending: `(q, k, v, layer) -> (what attention gives, what to keep)`, for q `(b, t, heads, d)`, k and v
            `(b, t, kv, d)` after rotation.
        change: `(path, layer, x, y) -> y`, called for each linear map, `attn/q_proj/kernel` and so on, with its input
            and its output, tokens as rows.

    Returns:
        The features, and what was kept with layers in front.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax.models import Model, ModelConfig
        >>> from lorax.models.attention import attend, visible
        >>> config = ModelConfig("llama", 11, 8, 12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> model = Model.init(config, jax.random.key(0))
        >>> ids = jnp.array([[1, 2, 3]])
        >>> see = visible(3, None, None)
        >>> features, _ = through_layers(config, model.params, ids, jnp.arange(3)[None],
        ...     lambda q, k, v, layer: (attend(q, k, v, see), None), lambda path, layer, x, y: y)
        >>> bool(jnp.allclose(features, model.hidden(model.params, ids)))
        True
    """
    definition = definition_of(config)
    decoder = nnx.merge(definition, params)
    turn = rotation(config, positions)
    shape, state = nnx.split(decoder.layers)

    def layer(x: Array, xs: Any) -> tuple[Array, Any]:
        weights, index = xs
        block = nnx.merge(shape, weights)
        for part, name in LINEAR:
            owner, path = getattr(block, part), f"{part}/{name}/kernel"
            linear = getattr(owner, name)
            setattr(owner, name, _Changed(linear, lambda x, y, path=path: change(path, index, x, y)))
        return block(x, turn, lambda q, k, v: attending(q, k, v, index))

    x = decoder.embed(ids.reshape(-1))
    x, kept = jax.lax.scan(layer, x, (state, jnp.arange(config.num_layers, dtype=jnp.int32)))
    return decoder.norm(x).reshape(*ids.shape, -1), kept


def head(config: ModelConfig, params: PyTree, x: Float[Array, "rows d"]) -> Float[Array, "rows vocab"]:
    """Logits of features."""
    return nnx.merge(definition_of(config), params).head(x)
