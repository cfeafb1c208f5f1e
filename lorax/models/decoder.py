"""The decoder of the Llama family as a Flax NNX module: read it from the bottom of the page, `Decoder` first.

    x = embed(ids)
    for each layer:   x += o(attend(rope(q(norm x)), rope(k(norm x)), v(norm x)))
                      x += down(silu(gate(norm x)) * up(norm x))
    logits = head(norm x)

All layers have one shape, so their parameters are stacked along a leading axis and `jax.lax.scan` runs over
them: one layer is compiled, however many there are. Tokens are rows: a batch `(B, T)` is `(B*T, D)`
everywhere but inside attention, because on CPU the backward pass of a two-dimensional product is much the
faster one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lorax.models.attention import KEPT, LONG, attend, attend_in_blocks, kept, visible
from lorax.models.cache import Cache, reserve, visible_slots
from lorax.models.config import ModelConfig
from lorax.models.rope import Rotation, rotate, rotation

# (q, k, v) of one layer -> (what attention gives, whatever the caller keeps of that layer)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

# The standard deviation of freshly drawn weights, as in the published models.
INIT_SCALE = 0.02


class Linear(nnx.Module):
    """y = x W (+ b), with W (in, out)."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool = False, dtype: Any, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (size_in, size_out), dtype)
        self.kernel = nnx.Param(draw * jnp.asarray(INIT_SCALE, dtype))
        self.bias = nnx.Param(jnp.zeros(size_out, dtype)) if bias else None

    def __call__(self, x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, size: int, eps: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse).astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; Qwen3 also normalises queries and keys per head."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        c, d = config, config.head_dim
        bias = c.attention_bias
        self.q_proj = Linear(c.hidden_size, c.num_heads * d, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * d, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * d, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(c.num_heads * d, c.hidden_size, bias=c.output_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(d, c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(d, c.norm_eps, dtype=dtype) if c.qk_norm else None
        self.head_dim = d

    def __call__(
        self, x: Float[Array, "rows d"], turn: Rotation, attending: Attend
    ) -> tuple[Float[Array, "rows d"], Any]:
        # A turn may have one row for the whole batch; the batch is what is left of the rows.
        t = turn.cos.shape[1]
        q, k, v = (
            proj(x).reshape(x.shape[0] // t, t, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        out, extra = attending(rotate(q, turn), rotate(k, turn), v)
        return self.o_proj(out.reshape(x.shape[0], -1)), extra


class MLP(nnx.Module):
    """down(silu(gate x) * up x). Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(d, f, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(f, d, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
        gate, up = kept(self.gate_proj(x)), kept(self.up_proj(x))
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows d"], turn: Rotation, attending: Attend
    ) -> tuple[Float[Array, "rows d"], Any]:
        out, extra = self.attn(self.attn_norm(x), turn, attending)
        x = kept(x + out)
        return x + self.mlp(self.mlp_norm(x)), extra


class Embed(nnx.Module):
    """Rows of a table by token id; transposed it is the head of a tied model."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype)
        self.embedding = nnx.Param(draw * jnp.asarray(INIT_SCALE, dtype))

    def __call__(self, ids: Int[Array, rows]) -> Float[Array, "rows d"]:
        # Ids outside the vocabulary are clipped: a fill value of NaN costs a comparison for every feature.
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")

    def attend(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows vocab"]:
        return jax.lax.dot_general(x, self.embedding[...], (((x.ndim - 1,), (1,)), ((), ())))


class Decoder(nnx.Module):
    """The whole model. Its parameters, with the attribute names as paths, are the tree that lorax adapts.

    Args:
        config: the shape.
        dtype: of the parameters, and so of the arithmetic outside norms, softmax and rotary embedding.
        remat: recompute each layer in the backward pass instead of keeping its activations (less memory, a
            third more work).
        rngs: where fresh weights are drawn from.
        stream: how the stream between layers, (rows, features), lies on a mesh; what each layer keeps for the
            backward pass lies so. By default the compiler decides.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
        stream: jax.sharding.Sharding | None = None,
    ):
        self.embed = Embed(config, dtype=dtype, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        tied, size = config.tie_embeddings, (config.hidden_size, config.vocab_size)
        outputs = len(config.labels)
        self.lm_head = None if tied or outputs else Linear(*size, dtype=dtype, rngs=rngs)
        self.score = Linear(config.hidden_size, outputs, dtype=dtype, rngs=rngs) if outputs else None
        self.config, self.remat, self.stream = config, remat, stream

    def __call__(
        self,
        ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Features after the final norm; `head` makes logits of them.

        Args:
            ids: tokens.
            positions: of each token in its document; counted from the start of the row (of the segment, if
                there are segments) by default.
            segment_ids: the document of each token, 0 for padding. Attention never crosses from one to
                another.
        """
        b, t = ids.shape
        if positions is None:
            positions = jnp.arange(t)[None] if segment_ids is None else positions_in_segments(segment_ids)
        turn = rotation(self.config, positions)
        attending = self._attending(t, segment_ids)
        shape, state = nnx.split(self.layers)

        def layer(x: Array, xs: Any) -> tuple[Array, None]:
            weights, index = xs
            x, _ = nnx.merge(shape, weights)(x, turn, lambda q, k, v: (attending(q, k, v, index), None))
            return self._laid_out(x), None

        policy = None if self.remat else jax.checkpoint_policies.save_only_these_names(KEPT)
        layers = (state, jnp.arange(self.config.num_layers) if self.config.full_layers else None)
        x = self._laid_out(self.embed(ids.reshape(-1)))
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=policy), x, layers)
        return self.norm(x).reshape(b, t, -1)

    def _attending(self, length: int, segment_ids: Int[Array, "b t"] | None) -> Callable[..., Array]:
        """Attention over whole rows in a layer, given its number; long rows in blocks."""
        window, full = self.config.sliding_window, self.config.full_layers
        if length > LONG:

            def in_blocks(q: Array, k: Array, v: Array, index: Array | None) -> Array:
                near = window if window is None or index is None else jnp.where(index < full, length, window)
                return attend_in_blocks(q, k, v, segment_ids, near)

            return in_blocks
        see = self._seen_by_layer(lambda window: visible(length, segment_ids, window))
        return lambda q, k, v, index: attend(q, k, v, see(index))

    def _seen_by_layer(self, mask: Callable[[int | None], Array]) -> Callable[[Array | None], Array]:
        """Who may see whom in a layer, given its number; the first ones may be without the window."""
        window, full = self.config.sliding_window, self.config.full_layers
        near, far = mask(window), mask(None) if full else None
        return lambda index: near if far is None or index is None else jnp.where(index < full, far, near)

    def _laid_out(self, x: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
        return x if self.stream is None else jax.lax.with_sharding_constraint(x, self.stream)

    def head(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows vocab"]:
        """Logits of features: over the vocabulary, or over a classifier's labels."""
        rows = x.reshape(-1, x.shape[-1])
        own = self.lm_head if self.score is None else self.score
        logits = self.embed.attend(rows) if own is None else own(rows)
        return logits.reshape(*x.shape[:-1], -1)

    def extend(
        self, ids: Int[Array, "b t"], cache: Cache, real: Bool[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Features of a chunk that follows what the cache holds, and the cache with the chunk in it.

        Args:
            ids: the chunk: a whole prompt, a part of one, or one token a row.
            cache: from `init_cache` or from the chunk before.
            real: False marks padding, which nothing ever sees. All True by default.
        """
        b, t = ids.shape
        start = cache.used
        cache, positions = reserve(cache, jnp.ones((b, t), bool) if real is None else real)
        turn = rotation(self.config, positions)
        see = self._seen_by_layer(lambda window: visible_slots(cache, positions, window))
        shape, state = nnx.split(self.layers)

        def layer(carry: Any, xs: Any) -> tuple[Any, None]:
            x, all_k, all_v = carry
            weights, index = xs
            # The caches are carried, not scanned over: the loop then writes the chunk in place.
            at = (index, zero, start, zero, zero)

            def attending(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
                ks = jax.lax.dynamic_update_slice(all_k, k[None].astype(all_k.dtype), at)
                vs = jax.lax.dynamic_update_slice(all_v, v[None].astype(all_v.dtype), at)
                past_k, past_v = (jax.lax.dynamic_index_in_dim(c, index, keepdims=False) for c in (ks, vs))
                return attend(q, past_k.astype(q.dtype), past_v.astype(q.dtype), see(index)), (ks, vs)

            x, (all_k, all_v) = nnx.merge(shape, weights)(x, turn, attending)
            return (x, all_k, all_v), None

        zero = jnp.zeros_like(start)
        indices = jnp.arange(self.config.num_layers, dtype=start.dtype)
        x = self.embed(ids.reshape(-1))
        (x, k, v), _ = jax.lax.scan(layer, (x, cache.k, cache.v), (state, indices))
        return self.norm(x).reshape(b, t, -1), cache._replace(k=k, v=v)


def positions_in_segments(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Each token's distance from the first of its segment.

    Example:
        >>> import jax.numpy as jnp
        >>> positions_in_segments(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    i = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment_ids != previous, i, 0)
    return i - jax.lax.cummax(start, axis=1)
