"""Training: small pure pieces, and the run that puts them together.

The pieces are meant to be copied: `cross_entropy` and `preference_loss` (losses), `make_step` (one step),
`learning_rate` (schedule), `fit` (the loop), `evaluate`, `Checkpoints`. `run` is `lorax train` as a function.

Names are resolved on first use, so that the command line can read `lorax.train.config` without importing JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax.train.checkpoint import Checkpoints
    from lorax.train.config import TrainConfig
    from lorax.train.evaluation import Evaluation, evaluate, make_scorer
    from lorax.train.loop import fit
    from lorax.train.loss import cross_entropy, score
    from lorax.train.methods import adapted
    from lorax.train.objective import language_model_loss, make_optimizer
    from lorax.train.preference import preference_loss
    from lorax.train.receipts import coverage
    from lorax.train.runner import run
    from lorax.train.schedule import learning_rate
    from lorax.train.step import State, init_state, make_step

_HOME = {
    "Checkpoints": "checkpoint",
    "Evaluation": "evaluation",
    "State": "step",
    "TrainConfig": "config",
    "adapted": "methods",
    "coverage": "receipts",
    "cross_entropy": "loss",
    "evaluate": "evaluation",
    "fit": "loop",
    "init_state": "step",
    "language_model_loss": "objective",
    "learning_rate": "schedule",
    "make_optimizer": "objective",
    "make_scorer": "evaluation",
    "make_step": "step",
    "preference_loss": "preference",
    "run": "runner",
    "score": "loss",
}

__all__ = [
    "Checkpoints",
    "Evaluation",
    "State",
    "TrainConfig",
    "adapted",
    "coverage",
    "cross_entropy",
    "evaluate",
    "fit",
    "init_state",
    "language_model_loss",
    "learning_rate",
    "make_optimizer",
    "make_scorer",
    "make_step",
    "preference_loss",
    "run",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
