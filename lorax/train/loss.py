"""Cross-entropy over a large vocabulary, a few rows of logits at a time.

For a completion of n tokens over a vocabulary of V words the logits are `(n, V)`: 200 MB for 1,024 tokens of
SmolLM2. They are never built. Rows are ordered so that those that count (weight above zero) come first, cut
into chunks, and each chunk makes its own logits, its own loss and, when the head is frozen, its own gradient.
A chunk in which nothing counts is skipped at run time: with prompts four times as long as completions, four
fifths of the head's work goes away.

Everything here is ordinary JAX, so `lorax.lift` sees through it when the head carries an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Head = Callable[[Float[Array, "rows d"]], Float[Array, "rows vocab"]]

# Rows of logits alive at once. 128 x 49,152 float32 are 25 MB; measured on two CPU cores, larger chunks gain
# nothing and smaller ones read the head's weights too often.
CHUNK = 128


class Scores(NamedTuple):
    """What one forward pass says about each position: its loss in nats, and whether the target was the
    argmax.
    """

    loss: Float[Array, "*batch"]
    hit: Float[Array, "*batch"]


class _Chunks(NamedTuple):
    rows: Float[Array, "chunks chunk d"]
    targets: Int[Array, "chunks chunk"]
    weights: Float[Array, "chunks chunk"]
    order: Int[Array, " padded"]


def cross_entropy(
    head: Head,
    hidden: Float[Array, "*batch d"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    *,
    head_trains: bool = True,
    chunk: int = CHUNK,
    groups: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of `-weight * log softmax(head(hidden))[target]`, and the sum of the weights.

    The two are returned apart because a mean over accumulated batches is `sum of sums / sum of weights`, not
    a mean of means.

    Args:
        head: rows of features to rows of logits. It is called on `(chunk, d)`.
        hidden: features after the final norm.
        targets: the token that each position should predict.
        weights: how much a position counts; zero rows cost nothing.
        head_trains: False says that nothing that `head` closes over is differentiated. The gradient with
            respect to `hidden` is then made in the forward pass, chunk by chunk, so that the logits are
            computed once instead of twice. With False, gradients of the head's own weights are lost.
        chunk: rows of logits alive at once.
        groups: equal parts of the batch that are chunked each on their own, side by side. On a mesh, as many as the
            batch is split over: rows then never leave their device, and a chunk is `chunk` rows of every part.

    Returns:
        The loss sum in nats and the weight sum, float32 scalars.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.eye(3)
        >>> total, count = cross_entropy(lambda h: h @ w, jnp.zeros((1, 2, 3)), jnp.array([[0, 1]]),
        jnp.ones((1, 2)))
        >>> round(float(total / count), 4)  # log 3
        1.0986
    """
    chunks = _chunked(hidden, targets, weights, chunk, groups)
    run = _sum_with_autodiff if head_trains else _sum_with_gradient
    return run(head, chunks), jnp.sum(weights.astype(jnp.float32))


def score(
    head: Head,
    hidden: Float[Array, "*batch d"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    *,
    chunk: int = CHUNK,
) -> Scores:
    """Loss and hit of every position whose weight is above zero; zero elsewhere.

    Under teacher forcing a completion is reproduced by greedy decoding exactly when every one of its tokens
    is a hit: as long as all tokens so far agree, both see the same prefix. So one forward pass gives loss and
    exact match.

    Returns:
        `Scores` shaped like `targets`: loss in nats (not multiplied by the weight) and hit (1.0 or 0.0).
    """
    chunks = _chunked(hidden, targets, weights, chunk)

    def one(rows, labels, w):
        logits = head(rows).astype(jnp.float32)
        live = (w > 0).astype(jnp.float32)
        return _nll(logits, labels) * live, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32) * live

    def step(_, xs):
        nothing = (jnp.zeros_like(xs[2]), jnp.zeros_like(xs[2]))
        return None, jax.lax.cond(jnp.any(xs[2] > 0), one, lambda *_: nothing, *xs)

    _, (loss, hit) = jax.lax.scan(step, None, chunks[:3])
    return Scores(*(_back(x, chunks.order, targets.shape) for x in (loss, hit)))


def features(model: Any, params: Any, batch: Any) -> Any:
    """The features of a batch's positions, (B, T, d): computed, or those that it brings."""
    if "features" in batch:
        return batch["features"]
    return model.hidden(params, batch["ids"], batch["positions"], batch["segment_ids"])


def log_probs(
    head: Head,
    hidden: Float[Array, "*batch d"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    *,
    chunk: int = CHUNK,
) -> Float[Array, "*batch"]:
    """`weight * log softmax(head(hidden))[target]` of every position, differentiable in everything.

    For losses that are no sum over tokens, such as those of preferences. Logits are made anew in the backward pass, a
    chunk of rows at a time; chunks in which nothing counts are not computed.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.eye(3)
        >>> rows = log_probs(lambda h: h @ w, jnp.zeros((1, 2, 3)), jnp.array([[0, 1]]), jnp.array([[1.0, 0.0]]))
        >>> [round(float(x), 4) for x in rows[0]]  # -log 3
        [-1.0986, 0.0]
    """
    chunks = _chunked(hidden, targets, weights, chunk)

    def one(rows, labels, w):
        return -_nll(head(rows).astype(jnp.float32), labels) * w

    @jax.checkpoint
    def step(_, xs):
        return None, jax.lax.cond(jnp.any(xs[2] > 0), one, lambda *_: jnp.zeros_like(xs[2]), *xs)

    _, found = jax.lax.scan(step, None, chunks[:3])
    return _back(found, chunks.order, targets.shape)


def _sum_with_autodiff(head: Head, chunks: _Chunks) -> Float[Array, ""]:
    """The plain definition: differentiable in everything; logits are remade in the backward pass."""

    def one(rows, labels, w):
        return jnp.sum(_nll(head(rows).astype(jnp.float32), labels) * w)

    if len(chunks.rows) == 1:
        return one(*(x[0] for x in chunks[:3]))

    @jax.checkpoint
    def step(total, xs):
        return total + jax.lax.cond(jnp.any(xs[2] > 0), one, lambda *_: jnp.float32(0), *xs), None

    return jax.lax.scan(step, jnp.float32(0), chunks[:3])[0]


def _sum_with_gradient(head: Head, chunks: _Chunks) -> Float[Array, ""]:
    """The same value; d loss / d hidden is computed beside it, from the logits that are there anyway.

    With p = softmax(logits) and e the one-hot target, d loss / d logits = weight * (p - e); the head's
    transpose carries it back to the rows.
    """

    def one(rows, labels, w):
        logits, back = jax.vjp(head, rows)
        wide = logits.astype(jnp.float32)
        lse = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
        here = jnp.arange(wide.shape[-1], dtype=labels.dtype) == labels[:, None]
        nll = lse[:, 0] - jnp.sum(jnp.where(here, wide, 0.0), axis=-1)
        p = jnp.exp(wide - lse)
        (d_rows,) = back((jnp.where(here, p - 1.0, p) * w[:, None]).astype(logits.dtype))
        return jnp.sum(nll * w), d_rows

    def step(total, xs):
        nothing = (jnp.float32(0), jnp.zeros_like(xs[0]))
        loss, d_rows = jax.lax.cond(jnp.any(xs[2] > 0), one, lambda *_: nothing, *xs)
        return total + loss, d_rows

    fixed = jax.lax.stop_gradient(chunks.rows)
    total, gradient = jax.lax.scan(step, jnp.float32(0), (fixed, chunks.targets, chunks.weights))
    # rows - fixed is exactly zero: the value is untouched, the derivative with respect to rows is `gradient`.
    gradient = jax.lax.stop_gradient(gradient).astype(jnp.float32)
    return jax.lax.stop_gradient(total) + jnp.sum(gradient * (chunks.rows - fixed).astype(jnp.float32))


def _chunked(hidden, targets, weights, chunk: int, groups: int = 1) -> _Chunks:
    if groups > 1:
        return _side_by_side(hidden, targets, weights, chunk, groups)
    d = hidden.shape[-1]
    rows, labels = hidden.reshape(-1, d), targets.reshape(-1)
    w = weights.reshape(-1).astype(jnp.float32)
    # No more rows of logits than there are rows.
    chunk = min(chunk, -(-len(w) // 8) * 8)
    order = jnp.argsort(w <= 0, stable=True)
    pad = -len(w) % chunk
    # A padding row repeats row 0 with weight 0; it never counts.
    order = jnp.concatenate([order, jnp.zeros(pad, order.dtype)])
    counts = jnp.concatenate([w[order[: len(w)]], jnp.zeros(pad, w.dtype)])
    shape = (-1, chunk)
    return _Chunks(rows[order].reshape(-1, chunk, d), labels[order].reshape(shape), counts.reshape(shape), order)


def _side_by_side(hidden, targets, weights, chunk: int, groups: int) -> _Chunks:
    """The chunks of each part of the batch, joined along their rows: (chunks, groups * chunk, ...)."""
    parts = [x.reshape(groups, -1, *x.shape[targets.ndim :]) for x in (hidden, targets, weights)]
    each = jax.vmap(lambda h, t, w: _chunked(h, t, w, chunk))(*parts)
    rows, labels, counts = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in each[:3])
    return _Chunks(rows, labels, counts, each.order.reshape(-1))


def _back(values, order, shape):
    """Undo the ordering: row i of the chunks goes to position order[i] (padding rows are cut off)."""
    size = 1
    for n in shape:
        size *= n
    flat = values.reshape(-1)[:size]
    return jnp.zeros(size, flat.dtype).at[order[:size]].set(flat, unique_indices=True).reshape(shape)


def _nll(logits: Float[Array, "rows vocab"], labels: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Negative log-likelihood of the labels, by comparison: a gather is slow on CPU."""
    here = jnp.arange(logits.shape[-1], dtype=labels.dtype) == labels[:, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
