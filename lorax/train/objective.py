"""What is minimised, and by what: the supervised loss of a decoder, and AdamW, its moments in 32 or 8 bits."""

from __future__ import annotations

from typing import Any

import optax

from lorax import dropout, join, lift, lora_plus
from lorax.optim import adamw8bit, offload
from lorax.train.config import TrainConfig
from lorax.train.loss import CHUNK, cross_entropy
from lorax.train.schedule import Schedule, learning_rate
from lorax.train.step import LossFn


def language_model_loss(model: Any, *, head_trains: bool, chunk: int = CHUNK, groups: int = 1) -> LossFn:
    """The supervised loss of a decoder: `(trainable, frozen, batch, key) -> (sum over completion tokens,
    their number)`.

    Args:
        model: anything with `.hidden(params, ids, positions, segment_ids)` and `.head(params, rows)`.
        head_trains: whether the weights behind `.head` are differentiated (see `cross_entropy`).
        chunk, groups: as in `cross_entropy`; on a mesh `groups` is how many parts the batch is split into.
    """

    def forward(params, batch):
        hidden = model.hidden(params, batch["ids"], batch["positions"], batch["segment_ids"])
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
