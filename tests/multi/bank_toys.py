"""A small model with everything that a bank can meet: scanned and checkpointed layers, an embedding that is also the

head, a weight of three axes, attention; odd sizes throughout. And adapters over it, as unlike each other as they come.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import lorax

LAYERS, WIDTH, HEADS, SIZE, INNER, VOCAB, LENGTH = 3, 10, 2, 5, 14, 23, 5


def model(params, ids):
    """Logits (length, vocab) of one example."""
    x = jnp.take(params["embed"], ids, axis=0)

    def block(x, w):
        q = (x @ w["q"]).reshape(-1, HEADS, SIZE)
        k = jnp.einsum("td,dhe->the", x, w["k"])
        scores = jax.nn.softmax(jnp.einsum("the,she->hts", q, k), axis=-1)
        x = x + jnp.einsum("hts,she->the", scores, k).reshape(x.shape) @ w["o"]
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
    return jax.lax.dot_general(x, params["embed"], (((1,), (1,)), ((), ())))


def base(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    n = lambda *shape: jnp.asarray(draw(shape) * 0.2, jnp.float32)  # noqa: E731
    layers = {"q": n(LAYERS, WIDTH, HEADS * SIZE), "k": n(LAYERS, WIDTH, HEADS, SIZE)}
    layers |= {"o": n(LAYERS, HEADS * SIZE, WIDTH), "up": n(LAYERS, WIDTH, INNER), "down": n(LAYERS, INNER, WIDTH)}
    return {"embed": n(VOCAB, WIDTH), "layers": layers}


def adapter(params, seed, targets="all-linear", rank=2, alpha=4.0, scaling="lora", spread=0.1):
    """An adapter with non-zero B over a base."""
    spec = lorax.LoraSpec(targets=targets, rank=rank, alpha=alpha, scaling=scaling)
    abstract = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    trained, frozen = lorax.split(lorax.adapt(jax.random.key(seed), params, spec, model, (abstract,)))
    draw = np.random.default_rng(seed).standard_normal
    moved = jax.tree.map(lambda x: x + jnp.asarray(draw(x.shape) * spread, x.dtype), trained)
    return lorax.join(moved, frozen)


def adapters(params):
    """Ranks 1, 3, 8 and 2, two scalings, overlapping targets."""
    return {
        "one": adapter(params, 1, ("*/q", "*/down"), 1),
        "all": adapter(params, 2, "all-linear", 3, 8.0, "rslora"),
        "ends": adapter(params, 3, ("embed", "*/k", "*/up"), 8, 3.0),
        "idle": adapter(params, 4, ("*/q", "embed"), 2),
    }


def tokens(count, seed=5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (count, LENGTH)))


def mixed(params, ids, xs):
    """Each example by its own adapter."""
    return jax.vmap(lambda i, x: lorax.lift(model)(lorax.select(params, i), x))(ids, xs)


def close(got, want, tolerance=1e-5):
    """Relative to the largest value of an array."""
    want = np.asarray(want, np.float64)
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * max(np.abs(want).max(), 1e-6)
