"""A whole QLoRA training step of the zoo's decoder, abstract, compiled for one device of a machine that is not here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from lorax import LoraSpec, adapt, quantize, split
from lorax.models import Model, ModelConfig
from lorax.train.objective import language_model_loss
from lorax.train.step import init_state, make_step
from lorax_kernels import target

CONFIG = ModelConfig("llama", 1024, 512, 1536, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128)
ROWS, LENGTH = 4, 160


def compiled(device: Any, platform: str, chip: str) -> str:
    """The optimised program, as text."""
    model = Model.abstract(CONFIG, jnp.bfloat16, remat=True)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = quantize(model.params, fn=model.apply, args=(ids,), platform=platform)
    params = adapt(jax.random.key(0), params, LoraSpec(rank=16), fn=model.apply, args=(ids,))
    trainable, frozen = split(params)
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, 0), trainable)
    step = make_step(language_model_loss(model, head_trains=False), optimizer)
    shape = (1, ROWS, LENGTH)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("ids", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    place = SingleDeviceSharding(device)
    put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)  # noqa: E731
    with target(platform, chip):
        return step.lower(put(state), put(frozen), put(batch)).compile().as_text()
