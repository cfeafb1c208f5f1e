"""What is minimised, and by what: the loss that the settings ask for, and AdamW, its moments in 32 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from lorax import dropout, join, lift, lora_plus
from lorax.optim import adamw8bit, offload
from lorax.train.config import TrainConfig
from lorax.train.evaluation import make_scorer
from lorax.train.loss import CHUNK, cross_entropy, features
from lorax.train.preference import make_pair_scorer, preference_loss
from lorax.train.regression import make_number_scorer, squared_error
from lorax.train.schedule import Schedule, learning_rate
from lorax.train.step import LossFn


def language_model_loss(model: Any, *, head_trains: bool, chunk: int = CHUNK, groups: int = 1) -> LossFn:
    """The supervised loss of a decoder: `(trainable, frozen, batch, key) -> (sum over completion tokens,
    their number)`.

    A batch may bring `features` (B, T, d) instead of token ids: those of a trunk in which nothing trains.

    Args:
        model: anything with `.hidden(params, ids, positions, segment_ids)` and `.head(params, rows)`. Of a classifier,
            the targets are its labels.
        head_trains: whether the weights behind `.head` are differentiated (see `cross_entropy`).
        chunk, groups: as in `cross_entropy`; on a mesh `groups` is how many parts the batch is split into.
    """

    def forward(params, batch):
        hidden = features(model, params, batch)
        if getattr(model, "stream", None) is not None:
            params = model.head_at_hand(params)
        return cross_entropy(
            lambda rows: model.head(params, rows),
            hidden,
            batch["targets"],
            batch["weights"],
            head_trains=head_trains,
            chunk=chunk,
            groups=groups,
        )

    lifted = lift(forward)
    # A tree whose rates are all zero comes back as it is.
    return lambda trainable, frozen, batch, key: lifted(dropout(join(trainable, frozen), key), batch)


def loss_for(model: Any, config: TrainConfig, *, head_trains: bool, groups: int = 1) -> LossFn:
    """The loss of a run: of tokens or labels, of numbers, or of preferences."""
    if config.loss == "dpo":
        return preference_loss(model, config.beta)
    if model.config.regression:
        return squared_error(model)
    return language_model_loss(model, head_trains=head_trains, groups=groups)


def scorer_for(model: Any, config: TrainConfig) -> Callable[..., Any]:
    """What `evaluate` measures in a run: the same loss, and what counts as a hit."""
    if config.loss == "dpo":
        return make_pair_scorer(model, config.beta)
    return make_number_scorer(model) if model.config.regression else make_scorer(model)


def make_optimizer(config: TrainConfig, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW behind a clip of the global norm, and its schedule.

    Args:
        config: `optimizer`, `paged`, `lr`, `lora_plus`, `warmup`, `schedule`, `clip` and `weight_decay` are read.
        steps: optimizer steps of the whole run.
    """
    rate = learning_rate(config.lr, steps, warmup=config.warmup, shape=config.schedule)
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip > 0 else []
    adamw = adamw8bit if config.optimizer == "adamw8bit" else optax.adamw
    tx = optax.chain(*clip, adamw(rate, weight_decay=config.weight_decay))
    tx = tx if config.lora_plus == 1.0 else lora_plus(tx, config.lora_plus)
    return (offload(tx) if config.paged else tx), rate
