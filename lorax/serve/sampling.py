"""From logits to tokens, on the device: one program for a batch whose rows each sample in their own way.

What no row of a batch asks for is not computed (`lax.cond`): a greedy batch costs one maximum. The likeliest `FEW`
tokens settle top-k and top-p almost always; where they do not, all are sorted.

A row's draw is the largest of `logits / temperature + Gumbel noise`, whose key is the request's seed and the token's
position: whatever else is in the batch, the same seed draws the same token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lorax.serve.request import MAX_LOGPROBS

FEW = 256
# Temperatures below are zero: XLA takes smaller numbers for it.
TINY = np.finfo(np.float32).tiny


class Settings(NamedTuple):
    """How each row samples; NumPy arrays on the way in. See `Sampling`.

    key: the seed's two halves. position: of the token that is drawn, in its sequence.
    want_logprobs: whether anybody does.
    seen: tokens of prompt and answer, -1 beyond, for rows with penalties; prompt: how many of them are the prompt.
    """

    temperature: Float[Any, "rows"]
    top_k: Int[Any, "rows"]
    top_p: Float[Any, "rows"]
    min_p: Float[Any, "rows"]
    repetition: Float[Any, "rows"]
    presence: Float[Any, "rows"]
    frequency: Float[Any, "rows"]
    key: UInt32[Any, "rows 2"]
    position: Int[Any, "rows"]
    want_logprobs: Bool[Any, ""]
    seen: Int[Any, "rows length"]
    prompt: Int[Any, "rows"]


class Drawn(NamedTuple):
    """tokens, and their log-probabilities and the likeliest tokens' where somebody wants them (else zeros)."""

    token: Int[Any, "rows"]
    logprob: Float[Any, "rows"]
    top: Int[Any, "rows 20"]
    top_logprob: Float[Any, "rows 20"]


def plain_settings(rows: int, length: int) -> Settings:
    """Greedy for every row, as NumPy arrays to be changed in place."""
    f = lambda value: np.full(rows, value, np.float32)  # noqa: E731
    return Settings(
        f(0), np.zeros(rows, np.int32), f(1), f(0), f(1), f(0), f(0), np.zeros((rows, 2), np.uint32),
        np.zeros(rows, np.int32), np.zeros((), bool), np.full((rows, length), -1, np.int32), np.zeros(rows, np.int32),
    )  # fmt: skip


def draw(logits: Float[Array, "rows vocab"], s: Settings) -> Drawn:
    """A token for each row.

    Example:
        >>> import jax.numpy as jnp
        >>> draw(jnp.array([[0.0, 2.0, 1.0]]), plain_settings(1, 4)).token.tolist()
        [1]
    """
    rows = logits.shape[0]
    penalised = jnp.any((s.repetition != 1) | (s.presence != 0) | (s.frequency != 0))
    changed = jax.lax.cond(penalised, lambda: _penalised(logits, s), lambda: logits)
    greedy = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(jnp.any(s.temperature >= TINY), lambda: _sampled(changed, greedy, s), lambda: greedy)
    few = min(MAX_LOGPROBS, logits.shape[1])
    nothing = (jnp.zeros(rows, jnp.float32), jnp.zeros((rows, few), jnp.int32), jnp.zeros((rows, few), jnp.float32))
    return Drawn(token, *jax.lax.cond(s.want_logprobs, lambda: _logprobs(logits, token, few), lambda: nothing))


def _logprobs(logits: Array, token: Array, few: int) -> tuple[Array, Array, Array]:
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, top = jax.lax.top_k(logits, few)
    mine = jnp.take_along_axis(logits, token[:, None], axis=1) - total
    return mine[:, 0], top.astype(jnp.int32), values - total


def _penalised(logits: Array, s: Settings) -> Array:
    """Logits with what is taken off for tokens that were there before."""
    rows, vocab = logits.shape
    place = jnp.arange(s.seen.shape[1], dtype=jnp.int32)
    real = s.seen >= 0
    at = jnp.where(real, s.seen, vocab)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    answer = (real & (place >= s.prompt[:, None])).astype(jnp.int32)
    count = jnp.zeros((rows, vocab), jnp.int32).at[row, at].add(answer, mode="drop")
    seen = jnp.zeros((rows, vocab), bool).at[row, at].set(True, mode="drop")
    by = s.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)
    off = s.presence[:, None] * (count > 0).astype(jnp.float32) + s.frequency[:, None] * count.astype(jnp.float32)
    return logits - off


def _sampled(logits: Array, greedy: Array, s: Settings) -> Array:
    heat = s.temperature >= TINY
    # The likeliest at zero, so that a tiny temperature leaves it alone finite.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.where(heat, s.temperature, 1.0)[:, None]
    limited = jnp.any(heat & ((s.top_k > 0) | (s.top_p < 1)))
    least = jax.lax.cond(limited, lambda: _least(logits, s), lambda: jnp.full(logits.shape[0], -jnp.inf))
    least = jnp.maximum(least, jnp.where(s.min_p > 0, jnp.log(jnp.maximum(s.min_p, TINY)), -jnp.inf))
    logits = jnp.where(logits >= least[:, None], logits, -jnp.inf)
    noise = jax.vmap(lambda key, at: _noise(key, at, logits.shape[1]))(s.key, s.position)
    drawn = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    return jnp.where(heat, drawn, greedy)


def _noise(key: Array, position: Array, vocab: int) -> Array:
    base = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(base, position), (vocab,), jnp.float32)


def _least(logits: Array, s: Settings) -> Float[Array, "rows"]:
    """The smallest logit of each row that top-k and top-p leave; all that are as large stay."""
    vocab = logits.shape[1]
    if vocab <= FEW:
        return _threshold(jax.lax.top_k(logits, vocab)[0], logits, s)[0]
    few, settled = _threshold(jax.lax.top_k(logits, FEW)[0], logits, s)
    return jax.lax.cond(jnp.all(settled), lambda: few, lambda: _threshold(-jnp.sort(-logits, axis=-1), logits, s)[0])


def _threshold(ordered: Array, logits: Array, s: Settings) -> tuple[Float[Array, "rows"], Bool[Array, "rows"]]:
    """What the likeliest tokens, in order, say about the smallest that stays, and whether they are enough to say it."""
    n, vocab = ordered.shape[1], logits.shape[1]
    k = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, vocab), vocab)
    at = jnp.minimum(k, n) - 1
    by_k = jnp.where(k >= vocab, -jnp.inf, jnp.take_along_axis(ordered, at[:, None], axis=1)[:, 0])
    total = jax.nn.logsumexp(jnp.where(logits >= by_k[:, None], logits, -jnp.inf), axis=-1, keepdims=True)
    p = jnp.where(ordered >= by_k[:, None], jnp.exp(ordered - total), 0.0)
    # A token stays if those before it fall short of top_p; the likeliest always stays.
    before = jnp.cumsum(p, axis=-1) - p
    stays = (before < s.top_p[:, None]) & (ordered >= by_k[:, None])
    by_p = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1)
    whole = s.top_p >= 1
    by_p = jnp.where(whole, -jnp.inf, by_p)
    cold = s.temperature < TINY
    enough_k = (k <= n) | (k >= vocab)
    enough_p = whole | ~stays[:, -1] | (n == vocab)
    return jnp.maximum(by_k, by_p), cold | (enough_k & enough_p)
