"""Text from a model: a batch of prompts of any lengths, continued token by token.

    prompts   ->  padded on the left to a bucket  ->  read into the cache chunk by chunk
    loop      ->  pick a token a row, append it; stops when all rows have ended

Lengths are rounded up to buckets, and what varies from call to call (how many tokens, temperature, seed) is data. So a
model compiles once for each bucket and batch size, whatever the prompts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from lorax.errors import LoraxError
from lorax.lift import lift
from lorax.models.cache import Cache, init_cache
from lorax.models.config import ModelConfig
from lorax.models.model import Model

# Temperatures below are zero: XLA takes smaller numbers for it.
TINY = np.finfo(np.float32).tiny

# The smallest bucket; above it lengths are rounded up to a power of two.
BUCKET = 16

# Tokens of a prompt read at once: bounds the memory of attention scores. A power of two, so that it divides buckets.
CHUNK = 256


class _Loop(NamedTuple):
    """What the loop carries: step number, last token a row, what was written, which rows have ended."""

    step: Int[Array, ""]
    last: Int[Array, b]
    written: Int[Array, "b n"]
    ended: Bool[Array, b]
    cache: Cache


def generate(
    model: Model,
    params: PyTree,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt until the model ends it or `max_new_tokens` are written.

    Args:
        model: gives the shape and the tokens that end a text.
        params: `model.params`, or an adapted tree over them.
        prompt_ids: token ids, at least one prompt of at least one token.
        max_new_tokens: at most this many for each prompt.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw only from the likeliest tokens that together have this probability.
        seed: of the draws. A row's draws depend on the seed and its place in the batch.

    Returns:
        The new token ids of each prompt, without the one that ends it.

    Raises:
        LoraxError: an empty prompt, a token outside the vocabulary, or a setting out of range.

    Example:
        >>> import jax
        >>> from lorax.models import Model, ModelConfig
        >>> config = ModelConfig("llama", 11, 8, 12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> model = Model.init(config, jax.random.key(0))
        >>> [len(new) for new in generate(model, model.params, [[1, 2, 3], [4]], max_new_tokens=5)]
        [5, 5]
    """
    _check(model.config, prompt_ids, max_new_tokens, temperature, top_p)
    if not prompt_ids or max_new_tokens == 0:
        return [[] for _ in prompt_ids]
    ids, real = _padded(prompt_ids)
    stop = _stop_ids(model)
    written = _run(
        model.config,
        bucket(max_new_tokens),
        bool(np.float32(temperature) >= TINY),
        top_p < 1.0,
        params,
        ids,
        real,
        np.array(stop or [-1], np.int32),
        np.int32(max_new_tokens),
        np.float32(temperature) if np.float32(temperature) >= TINY else np.float32(1.0),
        np.float32(top_p),
        jax.random.key(seed),
    )
    return [_until(row, stop) for row in np.asarray(written)[:, :max_new_tokens].tolist()]


def bucket(length: int) -> int:
    """The length rounded up to a power of two of at least 16.

    Example:
        >>> [bucket(n) for n in (1, 16, 17, 100)]
        [16, 16, 32, 128]
    """
    return max(BUCKET, 1 << (length - 1).bit_length())


def _check(
    config: ModelConfig, prompt_ids: list[list[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if max_new_tokens < 0:
        raise LoraxError(f"generate: max_new_tokens is {max_new_tokens}; it must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise LoraxError(f"generate: temperature is {temperature}; it must be 0 or above")
    if not 0 < top_p <= 1:
        raise LoraxError(f"generate: top_p is {top_p}; it must be above 0 and at most 1")
    for i, prompt in enumerate(prompt_ids):
        if not prompt:
            raise LoraxError(f"generate: prompt {i} has no tokens; give at least one")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise LoraxError(
                f"generate: prompt {i} has a token outside the vocabulary of {config.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )


def _padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts at the right end of a rectangle, so that the last column is the last token of all of them."""
    width = bucket(max(map(len, prompts)))
    ids, real = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = True
    return ids, real


def _stop_ids(model: Model) -> list[int]:
    own = getattr(model.tokenizer, "eos_id", None)
    return sorted({*model.config.eos_ids, *(() if own is None else (own,))})


def _until(row: list[int], stop: list[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in stop), row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    config: ModelConfig,
    room: int,
    sampling: bool,
    nucleus: bool,
    params: PyTree,
    ids: Int[Array, "b t"],
    real: Bool[Array, "b t"],
    stop: Int[Array, stops],
    limit: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Array,
) -> Int[Array, "b room"]:
    """The compiled whole: rows of new tokens, `room` of them, of which the first `limit` are written."""
    model = Model(config, {})
    rows, width = ids.shape

    extend, head = lift(model.extend), lift(model.head)

    def read(cache: Cache, chunk: tuple[Array, Array]) -> tuple[Cache, Array]:
        hidden, cache = extend(params, chunk[0], cache, chunk[1])
        return cache, hidden[:, -1]

    def pick(logits: Array, step: Array) -> Array:
        logits = logits.astype(jnp.float32)
        if not sampling:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The likeliest at zero, so that a tiny temperature leaves it alone finite.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        logits = keep_nucleus(logits, top_p) if nucleus else logits
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, step), row))(jnp.arange(rows))
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def ends(token: Array) -> Array:
        return jnp.any(token[:, None] == stop[None], axis=1)

    def more(loop: _Loop) -> Array:
        return (loop.step < limit) & ~jnp.all(loop.ended)

    def write(loop: _Loop) -> _Loop:
        cache, hidden = read(loop.cache, (loop.last[:, None], jnp.ones((rows, 1), bool)))
        token = pick(head(params, hidden), loop.step)
        written = jax.lax.dynamic_update_slice(loop.written, token[:, None], (jnp.zeros_like(loop.step), loop.step))
        return _Loop(loop.step + 1, token, written, loop.ended | ends(token), cache)

    def chunked(x: Array) -> Array:
        return x.reshape(rows, -1, min(CHUNK, width)).swapaxes(0, 1)

    dtype = params["norm"]["scale"].dtype
    cache = init_cache(config, rows, width + room, dtype)
    cache, hidden = jax.lax.scan(read, cache, (chunked(ids), chunked(real)))
    token = pick(head(params, hidden[-1]), jnp.int32(0))
    written = jnp.zeros((rows, room), jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(more, write, _Loop(jnp.int32(1), token, written, ends(token), cache)).written


def keep_nucleus(logits: Float[Array, "b v"], top_p: Float[Array, ""]) -> Float[Array, "b v"]:
    """-inf for all but the likeliest tokens whose probabilities together reach `top_p`.

    Source: Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".

    Example:
        >>> import jax.numpy as jnp
        >>> jnp.exp(keep_nucleus(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.float32(0.4))).round(2).tolist()
        [[0.5, 0.0, 0.0]]
    """
    ordered = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it fall short of top_p; the likeliest always stays.
    stays = jnp.cumsum(p, axis=-1) - p < top_p
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
