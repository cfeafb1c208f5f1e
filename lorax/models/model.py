"""A model as data and pure functions: a config, a plain tree of arrays, a tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from lorax.errors import LoraxError
from lorax.models.cache import Cache, init_cache
from lorax.models.config import ModelConfig
from lorax.models.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder and its weights. Every method that takes `params` is a pure function of it: jit,
    differentiate or `lorax.lift` it, with `model.params` or any tree of the same paths.

    config: the shape.
    params: a plain nested dict of arrays; `Decoder`'s attribute names are the keys.
    tokenizer: None for a model that was drawn at random.
    remat: recompute layers in the backward pass.
    stream: how the features between layers, (rows, features), lie on a mesh; None leaves it to the compiler.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> config = ModelConfig("llama", 11, 8, 12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> model = Model.init(config, jax.random.key(0))
        >>> model.apply(model.params, jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    remat: bool = False
    stream: jax.sharding.Sharding | None = field(default=None, repr=False)

    @classmethod
    def init(cls, config: ModelConfig, key: Array, dtype: Any = jnp.float32, remat: bool = False) -> Model:
        """A model with fresh weights: normal with standard deviation 0.02, norms one, biases zero."""
        return cls(config, _draw(config, jnp.dtype(dtype), key), None, remat)

    @classmethod
    def abstract(cls, config: ModelConfig, dtype: Any = jnp.float32, remat: bool = False) -> Model:
        """A model whose `params` are `jax.ShapeDtypeStruct`: no memory, whatever the size."""
        return cls(config, abstract_params(config, dtype), None, remat)

    def apply(
        self,
        params: PyTree,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Logits of every token. For the arguments see `Decoder.__call__`."""
        decoder = self._bind(params)
        return decoder.head(decoder(ids, positions, segment_ids))

    def hidden(
        self,
        params: PyTree,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Features of every token after the final norm."""
        return self._bind(params)(ids, positions, segment_ids)

    def head_at_hand(self, params: PyTree) -> PyTree:
        """The tree with the head's weight gathered from the devices that share the batch, as its products need it.

        A loss over chunks of rows says so once, before its loop: a compiler gathers inside the loop, once a chunk.
        Without `stream` the tree is returned as it is.
        """
        place = self.stream
        if not isinstance(place, NamedSharding):
            return params
        tensor = place.spec[1] if len(place.spec) > 1 else None
        tied = self.config.tie_embeddings
        if self.config.labels:
            return params  # its head is small: every device has it
        outer, name = ("embed", "embedding") if tied else ("lm_head", "kernel")
        spec = PartitionSpec(tensor, None) if tied else PartitionSpec(None, tensor)
        put = jax.lax.with_sharding_constraint(params[outer][name], NamedSharding(place.mesh, spec))
        return {**params, outer: {**params[outer], name: put}}

    def head(self, params: PyTree, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows vocab"]:
        """Logits of features."""
        return self._bind(params).head(hidden)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache of keys and values, by default in the dtype of `self.params`."""
        return init_cache(self.config, batch, length, _dtype_of(self.params) if dtype is None else dtype)

    def decode(
        self, params: PyTree, ids: Int[Array, "b t"], cache: Cache, real: Bool[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t vocab"], Cache]:
        """Logits of a chunk of tokens after those in the cache, and the cache with the chunk appended.

        Args:
            params: the weights.
            ids: a whole prompt, a part of one, or one token a row.
            cache: from `init_cache` or the last call.
            real: False marks padding, on either side or in the middle; nothing sees it and no position counts
                it.
        """
        hidden, cache = self.extend(params, ids, cache, real)
        return self.head(params, hidden), cache

    def extend(
        self, params: PyTree, ids: Int[Array, "b t"], cache: Cache, real: Bool[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """`decode` without the head: a prompt needs the logits of its last token alone."""
        return self._bind(params).extend(ids, cache, real)

    def _bind(self, params: PyTree) -> Decoder:
        definition, expected = _definition(self.config, self.remat, self.stream)
        if jax.tree.structure(params) != expected:
            raise LoraxError(_difference(params, self.config))
        return nnx.merge(definition, params)


@functools.lru_cache(maxsize=64)
def _definition(config: ModelConfig, remat: bool, stream: jax.sharding.Sharding | None) -> tuple[Any, Any]:
    """The module without its arrays, and the structure of its parameter tree."""
    module = nnx.eval_shape(lambda: Decoder(config, remat=remat, rngs=nnx.Rngs(0), stream=stream))
    definition, state = nnx.split(module)
    return definition, jax.tree.structure(_plain(state))


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves, which take no memory."""
    module = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return _plain(nnx.split(module)[1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(config: ModelConfig, dtype: Any, key: Array) -> dict[str, Any]:
    return _plain(nnx.split(Decoder(config, dtype=dtype, rngs=nnx.Rngs(key)))[1])


def _plain(state: nnx.State) -> dict[str, Any]:
    return nnx.to_pure_dict(state)


def _dtype_of(params: PyTree) -> Any:
    # A norm's scale is never quantised.
    return params["norm"]["scale"].dtype if "norm" in params else jnp.float32


def _difference(params: PyTree, config: ModelConfig) -> str:
    """The first path that the tree lacks or has too much."""
    have = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params)}
    tree = abstract_params(config)
    want = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(tree)}
    missing, extra = sorted(want - have), sorted(have - want)
    way_out = f"for this {config.family} config; use the weights that belong to it"
    if missing:
        return f"params: {missing[0]} is missing {way_out}"
    if extra:
        return f"params: {extra[0]} is one weight too many {way_out}"
    return "params: not a plain nested dict of arrays; adapted trees go through lorax.lift"


def definition_of(config: ModelConfig) -> Any:
    """The decoder without its arrays, for `nnx.merge`."""
    return _definition(config, False, None)[0]
