"""A language model as a classifier: the head over the vocabulary makes way for one over labels.

    scores = score(features of the last token)          score (d, labels), no bias

That is transformers' `...ForSequenceClassification`, so such a model is saved and read as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.models.decoder import INIT_SCALE


def with_labels(model: Any, labels: Sequence[str], key: jax.Array, *, regression: bool = False) -> Any:
    """The model with a new head over labels, drawn at random, in the place of the one over the vocabulary.

    Args:
        model: a language model.
        labels: names of the outputs, in their order; one for a number.
        key: a JAX random key.
        regression: the outputs are numbers.

    Returns:
        A model whose `head` gives (rows, labels); its tree has `score/kernel (d, labels)` and no `lm_head`.

    Raises:
        LoraxError: fewer than two classes, two of one name, or a model that is a classifier already.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax.models import Model, ModelConfig
        >>> config = ModelConfig("llama", 11, 8, 12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> model = with_labels(Model.init(config, jax.random.key(0)), ("no", "yes"), jax.random.key(1))
        >>> model.apply(model.params, jnp.array([[1, 2, 3]]))[:, -1].shape
        (1, 2)
    """
    if model.config.labels:
        raise LoraxError(f"the model is a classifier of {len(model.config.labels)} labels already; train that head")
    if len(set(labels)) != len(labels) or len(labels) < (1 if regression else 2):
        raise LoraxError(f"a classifier needs two different labels at least, and these are {list(labels)[:4]}")
    size = (model.config.hidden_size, len(labels))
    # In float32 whatever the base is: it is drawn once.
    kernel = INIT_SCALE * jax.random.normal(key, size, jnp.float32)
    rest = {name: value for name, value in model.params.items() if name != "lm_head"}
    dtype = model.params["norm"]["scale"].dtype
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, labels=tuple(labels), regression=regression),
        params={**rest, "score": {"kernel": kernel.astype(dtype)}},
    )
