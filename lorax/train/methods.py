"""Ways to fine-tune, as masks over the same tree.

    lora     LowRank leaves on the targets          only A and B train
    qlora    the same over a quantised base         only A and B train
    full     every leaf is Full                     everything trains
    head     lm_head is Full                        a linear probe over frozen features
    last-k   stacked leaves are Concat(frozen, Full) the top k blocks train

Nothing after this file knows which one was chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lorax import LoraSpec, adapt
from lorax.quant import loftq
from lorax.train.config import TrainConfig
from lorax.tree import train_last


def adapted(model: Any, config: TrainConfig) -> tuple[Any, PyTree]:
    """The model and its parameters with the leaves that `config.method` lets train.

    Args:
        model: a zoo model (`.params`, `.config`, `.apply`); for `qlora` loaded with `config.quantised`.
        config: the run; `method`, `targets`, `rank`, `alpha`, `scaling`, `last_k` and `seed` are read.

    Returns:
        The model (with an untied head for `head`) and the tree with structured leaves. It computes what the
        base computes until the first step.

    Raises:
        LoraxError: a pattern matches nothing, a rank does not fit, or there are fewer than `last_k` blocks.
    """
    if config.method == "last-k":
        return model, train_last(model.params, config.last_k, pattern="layers/*")
    if config.method == "head":
        model = untied(model)
    key = jax.random.key(config.seed)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    if config.method == "qlora" and config.loftq:
        quant = (config.quant, config.double_quant, config.quant_block, config.loftq)
        return model, loftq(model.params, spec_for(config), *quant, fn=model.apply, args=(example,))
    return model, adapt(key, model.params, spec_for(config), fn=model.apply, args=(example,))


def spec_for(config: TrainConfig) -> LoraSpec:
    """The `LoraSpec` of a method that is one."""
    if config.method == "full":
        return LoraSpec(targets=(), train_also="*")
    if config.method == "head":
        return LoraSpec(targets=(), train_also="lm_head/*")
    targets = config.targets[0] if len(config.targets) == 1 else config.targets
    return LoraSpec(targets=targets, rank=config.rank, alpha=config.alpha, scaling=config.scaling)


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
    names = ("embed", "lm_head") if config.tie_embeddings else ("lm_head",)
    return any(bool(jax.tree.leaves(trainable.get(name))) for name in names)
