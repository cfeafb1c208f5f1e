"""A tiny model, adapters of mixed rank on disk, and what the model says when it is asked alone."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import lorax
from lorax.models import Model, ModelConfig
from lorax.models.tokenizer import Tokenizer
from lorax.serve import Engine, EngineConfig, Request, Sampling

LENGTH = 48
SHAPE = ModelConfig("llama", 37, 24, 40, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=4, tie_embeddings=True)
# One of every kind: odd ranks, a rank for each weight, few weights, a rank of several pieces.
RANKS = {"one": 3, "two": {"*mlp*": 11, "*": 5}, "three": 8}
PAGE_TOKENS = 6
PAGE_BYTES = 4 * 2 * 2 * 2 * 4 * PAGE_TOKENS


@cache
def model() -> Model:
    """With weights that matter, and a word for each token."""
    drawn = Model.init(SHAPE, jax.random.key(0))
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(SHAPE.vocab_size)}, unk_token="w0")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return dataclasses.replace(drawn, params=jax.tree.map(lambda x: x * 6, drawn.params), tokenizer=Tokenizer(inner))


@cache
def adapters():
    """Adapted trees by name, B non-zero."""
    out = {}
    for i, (name, rank) in enumerate(RANKS.items()):
        targets = ["*q_proj*", "*down_proj*"] if name == "three" else "all-linear"
        spec = lorax.LoraSpec(targets=targets, rank=rank, alpha=6.0)
        tree = lorax.adapt(jax.random.key(i + 1), model().params, spec)
        draw = np.random.default_rng(i)

        def filled(leaf, draw=draw):
            if not hasattr(leaf, "B"):
                return leaf
            return dataclasses.replace(leaf, B=jnp.asarray(0.4 * draw.standard_normal(leaf.B.shape), jnp.float32))

        out[name] = jax.tree.map(filled, tree, is_leaf=lambda leaf: hasattr(leaf, "B"))
    return out


@cache
def _folder():
    """Compiled programs of all engines of this process: most have the same."""
    return tempfile.mkdtemp(prefix="lorax-programs-")


@cache
def _apply():
    return jax.jit(lorax.lift(model().apply))


def logits(name, ids):
    """float32 logits after the last token, from lift(apply)."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    params = model().params if name is None else adapters()[name]
    return np.asarray(_apply()(params, row))[0, len(ids) - 1]


def alone(request):
    """The greedy answer of lift(apply), token by token."""
    ids = list(request.prompt)
    for _ in range(request.max_new_tokens):
        ids.append(int(np.argmax(logits(request.adapter, ids))))
    return tuple(ids[len(request.prompt) :])


def save(folder):
    for name, tree in adapters().items():
        lorax.save_adapter(folder / name, tree)


def config(pages=300, **changes):
    given = {
        "max_batch": 4,
        "max_length": LENGTH,
        "page_tokens": PAGE_TOKENS,
        "chunk": 8,
        "max_rank": 12,
        "compiled": _folder(),
    }
    return EngineConfig(**{**given, "pool_bytes": pages * PAGE_BYTES, **changes})


def started(folder, **changes):
    """An engine with all adapters, saved before in `folder`."""
    engine = Engine(changes.pop("model", model()), config(**changes))
    for name in adapters():
        engine.load(name, folder / name)
    engine.start()
    return engine


def requests(count, new=8, seed=0, **changes):
    """Prompts of different lengths, for all adapters and the base in turn; some begin alike."""
    draw = np.random.default_rng(seed)
    names = [None, *adapters()]
    begin = draw.integers(0, SHAPE.vocab_size, 9).tolist()
    out = []
    for i in range(count):
        own = draw.integers(0, SHAPE.vocab_size, int(draw.integers(1, 14))).tolist()
        prompt = tuple((begin if i % 3 else []) + own)
        out.append(Request(prompt, names[i % len(names)], new, Sampling(temperature=0.0), **changes))
    return out


def idle(engine):
    """Nothing runs: every page is free, the prefix cache's or an adapter's."""
    stats = engine.stats()
    return stats.running == stats.waiting == stats.pages_kv == 0
