"""From logits to tokens, on the device: one program for a batch whose rows each sample in their own way.

What no row of a batch asks for is not computed (`lax.cond`): a greedy batch costs one maximum. The likeliest `FEW`
tokens settle top-k and top-p almost always; where they do not, the threshold is found by halving.

A row's draw turns one uniform number into a token through the cumulative distribution. The number's key is the
request's seed and the token's position: whatever else is in the batch, the same seed draws the same token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lorax.serve.request import MAX_LOGPROBS

FEW = 256
# The vocabulary is taken in blocks: sums and maxima of blocks first, then the one block that matters.
BLOCK = 64
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
    plain = ~jnp.any((s.temperature >= TINY) | _is_penalised(s))
    token = jax.lax.cond(plain, lambda: _argmax(logits), lambda: _chosen(logits, s))
    few = min(MAX_LOGPROBS, logits.shape[1])
    nothing = (jnp.zeros(rows, jnp.float32), jnp.zeros((rows, few), jnp.int32), jnp.zeros((rows, few), jnp.float32))
    return Drawn(token, *jax.lax.cond(s.want_logprobs, lambda: _logprobs(logits, token, few), lambda: nothing))


def _logprobs(logits: Array, token: Array, few: int) -> tuple[Array, Array, Array]:
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, top = jax.lax.top_k(logits, few)
    mine = jnp.take_along_axis(logits, token[:, None], axis=1) - total
    return mine[:, 0], top.astype(jnp.int32), values - total


def _is_penalised(s: Settings) -> Bool[Array, "rows"]:
    return (s.repetition != 1) | (s.presence != 0) | (s.frequency != 0)


def _chosen(logits: Array, s: Settings) -> Int[Array, "rows"]:
    logits = jax.lax.cond(jnp.any(_is_penalised(s)), lambda: _penalised(logits, s), lambda: logits)
    greedy, heat = _argmax(logits), s.temperature >= TINY
    return jax.lax.cond(jnp.any(heat), lambda: jnp.where(heat, _sampled(logits, s), greedy), lambda: greedy)


def _blocks(x: Array, fill: float) -> Float[Array, "rows blocks BLOCK"]:
    """A row in blocks, filled up at the end."""
    missing = -x.shape[1] % BLOCK
    x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill) if missing else x
    return x.reshape(x.shape[0], -1, BLOCK)


def _block(x: Float[Array, "rows blocks BLOCK"], at: Int[Array, "rows"]) -> Float[Array, "rows BLOCK"]:
    return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


def _argmax(logits: Array) -> Int[Array, "rows"]:
    """The first of the largest; a compiler makes slow code of one search over a whole row."""
    x = _blocks(logits, -jnp.inf)
    block = jnp.argmax(jnp.max(x, axis=-1), axis=-1).astype(jnp.int32)
    return block * BLOCK + jnp.argmax(_block(x, block), axis=-1).astype(jnp.int32)


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


def _sampled(logits: Array, s: Settings) -> Int[Array, "rows"]:
    heat = s.temperature >= TINY
    # The likeliest at zero, so that a tiny temperature leaves it alone finite.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.where(heat, s.temperature, 1.0)[:, None]
    limited = jnp.any(heat & ((s.top_k > 0) | (s.top_p < 1)))
    least = jax.lax.cond(limited, lambda: _least(logits, s), lambda: jnp.full(logits.shape[0], -jnp.inf))
    least = jnp.maximum(least, jnp.where(s.min_p > 0, jnp.log(jnp.maximum(s.min_p, TINY)), -jnp.inf))
    weights = _blocks(jnp.where(logits >= least[:, None], jnp.exp(logits), 0.0), 0.0)
    sums = jnp.sum(weights, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = jax.vmap(_uniform)(s.key, s.position) * ends[:, -1]
    block = _first_above(ends, sums, target)
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    inside = _block(weights, block)
    return block * BLOCK + _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)


def _uniform(key: Array, position: Array) -> Float[Array, ""]:
    base = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(base, position), (), jnp.float32)


def _first_above(ends: Array, parts: Array, target: Array) -> Int[Array, "rows"]:
    """The first whose cumulative sum is above the target; never one without weight, whatever sums were rounded to."""
    place = jnp.arange(ends.shape[1], dtype=jnp.int32)
    found = jnp.sum(ends <= target[:, None], axis=-1, dtype=jnp.int32)
    last = jnp.max(jnp.where(parts > 0, place, 0), axis=-1)
    return jnp.minimum(found, last)


def _least(logits: Array, s: Settings) -> Float[Array, "rows"]:
    """The smallest logit of each row that top-k and top-p leave; all that are as large stay."""
    vocab = logits.shape[1]
    if vocab <= FEW:
        return _threshold(jax.lax.top_k(logits, vocab)[0], logits, s)[0]
    few, settled = _threshold(jax.lax.top_k(logits, FEW)[0], logits, s)
    return jax.lax.cond(jnp.all(settled), lambda: few, lambda: _halved(logits, s))


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


def _halved(logits: Array, s: Settings) -> Float[Array, "rows"]:
    """`_threshold` by halving the range of all floats: the smallest t with fewer than k tokens, and less than top_p of
    what top-k leaves, above it."""
    k = jnp.where(s.top_k > 0, s.top_k, logits.shape[1]).astype(jnp.int32)
    by_k = _smallest(logits, lambda above: jnp.sum(above, axis=-1, dtype=jnp.int32) < k)
    p = jnp.where(logits >= by_k[:, None], jnp.exp(logits), 0.0)
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    by_p = _smallest(logits, lambda above: jnp.sum(jnp.where(above, p, 0.0), axis=-1) < s.top_p)
    return jnp.maximum(by_k, jnp.where(s.top_p >= 1, -jnp.inf, by_p))


def _smallest(logits: Array, good: Callable[[Array], Array]) -> Float[Array, "rows"]:
    """The smallest t for which `good` holds of `logits > t`; it holds from there on. Exact: the floats are counted
    through in their order. Logits are at most zero."""
    as_float = lambda n: jax.lax.bitcast_convert_type(-1 - n | jnp.int32(-(2**31)), jnp.float32)  # noqa: E731

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        fine = good(logits > as_float(middle)[:, None])
        return jnp.where(fine, low, middle + 1), jnp.where(fine, middle, high)

    rows = logits.shape[0]
    # From minus infinity to minus zero: as whole numbers they grow with the float.
    infinite = jnp.int32(0x7F800000)
    ends = (jnp.full(rows, -1 - infinite), jnp.full(rows, -1))
    return as_float(jax.lax.fori_loop(0, 32, halve, ends)[0])
