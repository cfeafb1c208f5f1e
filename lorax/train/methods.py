"""Ways to fine-tune, as masks over the same tree.

    lora     LowRank leaves on the targets          only A and B train
    qlora    the same over a quantised base,        only A and B train
             from where they make up for its error
    full     every leaf is Full                     everything trains
    head     lm_head (or score, of a classifier)    a linear probe over frozen features
             is Full
    last-k   stacked leaves are Concat(frozen, Full) the top k blocks train

`--train-also` makes further leaves Full, whatever the method, and so does the head of a classifier. Nothing after this
file knows which one was chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lorax import Concat, Full, LoraSpec, Quantized, adapt
from lorax.choose import choose
from lorax.errors import LoraxError
from lorax.models import Original
from lorax.quant import fit_factors
from lorax.train.config import TrainConfig
from lorax.tree import map_named, named_leaves, train_last

# Tokens whose activations EVA looks at: a few for each direction that it may take.
EVA_TOKENS = 4096


def adapted(model: Any, config: TrainConfig, tokens: np.ndarray | None = None) -> tuple[Any, PyTree]:
    """The model and its parameters with the leaves that `config.method` lets train.

    Args:
        model: a zoo model (`.params`, `.config`, `.apply`); for `qlora` loaded with `config.quantised`.
        config: the run; `method`, `targets`, `train_also`, `rank`, `alpha` (and their patterns), `scaling`, `variant`,
            `init`, `dropout`, `loftq`, `last_k` and `seed` are read.
        tokens: training text for `--init eva`, int32, one after another.

    Returns:
        The model (with an untied head for `head`) and the tree with structured leaves. It computes what the
        base computes until the first step; with LoftQ, something nearer to what the base was quantised from.

    Raises:
        LoraxError: a pattern matches nothing, a rank does not fit, or there are fewer than `last_k` blocks.
    """
    if config.method == "last-k":
        return model, _also(train_last(model.params, config.last_k, pattern="layers/*"), also_patterns(config, model))
    if config.method == "head" and not model.config.labels:
        model = untied(model)
    key = jax.random.key(config.seed)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    if config.init == "eva":
        # Features only: the logits of a batch would take more memory than all the rest.
        return model, adapt(
            key, model.params, spec_for(config, model), fn=model.hidden, args=(_rows(tokens, config.seq_len),)
        )
    params = adapt(key, model.params, spec_for(config, model), fn=model.apply, args=(example,))
    if config.loftq:
        params = fit_factors(params, Original(config.base, config.dtype), config.loftq)
    return model, params


def check_base(config: TrainConfig) -> None:
    """Whether the base can be trained so.

    Raises:
        LoraxError: LoftQ is asked for, and the base's file is in 4 bits itself.
    """
    if config.loftq and Original(config.base).packed:
        raise LoraxError(
            f"--loftq {config.loftq}: {config.base} holds its weights in 4 bits, and what was lost is not there to be "
            "made up for; take the base in 16 bits, or --loftq 0"
        )


def _rows(tokens: np.ndarray | None, length: int) -> jax.Array:
    """A few full rows of text. No padding, whose activations are nobody's."""
    have = np.zeros(0, np.int32) if tokens is None else tokens[:EVA_TOKENS]
    if not have.size:
        raise LoraxError("--init eva reads activations of the training text, and there is none")
    length = min(length, have.size)
    return jnp.asarray(have[: have.size // length * length].reshape(-1, length).astype(np.int32))


def also_patterns(config: TrainConfig, model: Any) -> tuple[str, ...]:
    """What trains as it is beside the method's own: what the user named, and the head of a classifier."""
    return (*config.train_also, *(("score/*",) if model.config.labels else ()))


def _also(params: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """A tree in which some leaves train already, with further ones that do.

    Raises:
        LoraxError: a pattern matches nothing, or a quantised weight.
    """
    chosen = set(choose(patterns, named_leaves(params), "train_also"))

    def one(path: str, leaf: Any) -> Any:
        if path in chosen and isinstance(leaf, Quantized):
            raise LoraxError(f"{path}: is quantised and cannot train as a whole; leave it out of train_also")
        # A weight whose last layers train is joined again: all of it trains.
        whole = leaf.dense() if isinstance(leaf, Concat) else leaf
        return Full(whole) if path in chosen and not isinstance(leaf, Full) else leaf

    return map_named(one, params)


def only_head(trainable: PyTree) -> bool:
    """Whether nothing below the head trains, so that the head's inputs stay what they are."""
    return bool(jax.tree.leaves(trainable)) and all(
        name in ("lm_head", "score") or not jax.tree.leaves(part) for name, part in trainable.items()
    )


def spec_for(config: TrainConfig, model: Any) -> LoraSpec:
    """The `LoraSpec` of a method that is one."""
    also = also_patterns(config, model)
    if config.method == "full":
        return LoraSpec(targets=(), train_also="*")
    if config.method == "head":
        return LoraSpec(targets=(), train_also=also if model.config.labels else ("lm_head/*", *also))
    targets = config.targets[0] if len(config.targets) == 1 else config.targets
    return LoraSpec(
        targets=targets,
        rank=config.ranks(),
        alpha=config.alphas(),
        scaling=config.scaling,
        variant=config.variant,
        init=config.init,
        dropout=config.dropout,
        train_also=also,
    )


def untied(model: Any) -> Any:
    """The same model with a head of its own: `lm_head/kernel (D, V)`, a copy of the embedding's transpose.

    Training the head of a tied model would move the embedding as well, which is another method.
    """
    if not model.config.tie_embeddings:
        return model
    kernel = jnp.array(model.params["embed"]["embedding"].T)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, tie_embeddings=False),
        params={**model.params, "lm_head": {"kernel": kernel}},
    )


def head_trains(trainable: PyTree, config: Any) -> bool:
    """Whether the function from features to logits has weights that train: decides how the loss is
    differentiated.
    """
    names = ("score",) if config.labels else ("embed", "lm_head") if config.tie_embeddings else ("lm_head",)
    return any(bool(jax.tree.leaves(trainable.get(name))) for name in names)
