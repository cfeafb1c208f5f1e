"""A training step that is planned, as abstract trees: shapes, dtypes and shardings, and no array anywhere."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from lorax import LoraSpec, adapt, quantize, split
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig
from lorax.optim import adamw8bit
from lorax.plan.target import Target
from lorax.sharding import batch_axes, follow, shard, shardings
from lorax.train.step import init_state

CHUNK = 512
METHODS = ("lora", "qlora", "full", "head")


@dataclass(frozen=True)
class Job:
    """What would be run.

    base: shape of the model.
    method: `"lora"`, `"qlora"`, `"full"` or `"head"`.
    target: the chips; mesh: axis -> size over them.
    rank, targets: of the low-rank changes.
    seq: tokens in a row; batch: rows of a step, over all chips.
    dtype: of the weights and the arithmetic; factors and Adam's moments are float32.
    optimizer: `"adamw"` or `"adamw8bit"`.
    remat: layers are computed again in the backward pass.
    """

    base: ModelConfig
    method: str
    target: Target
    mesh: dict[str, int]
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    seq: int = 4096
    batch: int = 16
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    remat: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LoraxError(f"--method {self.method}: choose one of {', '.join(METHODS)}")
        for name in ("rank", "seq", "batch"):
            if getattr(self, name) < 1:
                raise LoraxError(f"--{name} {getattr(self, name)}: must be at least 1")

    @property
    def config(self) -> ModelConfig:
        """The model's shape; a head that trains is its own, not the embedding's transpose."""
        return dataclasses.replace(self.base, tie_embeddings=False) if self.method == "head" else self.base

    @property
    def chunk(self) -> int:
        """Rows of logits alive at once on a chip: few large products on chips, which have no cache to stay in."""
        return min(CHUNK, self.seq * self.batch // self.data_parts)

    @property
    def data_parts(self) -> int:
        """Parts that the batch is split into."""
        return math.prod(self.mesh[name] for name in batch_axes(tuple(self.mesh)))

    @property
    def tensor_parts(self) -> int:
        return self.mesh.get("model", 1)

    @property
    def fsdp_parts(self) -> int:
        return self.mesh.get("fsdp", self.mesh.get("data", 1))

    def abstract_mesh(self) -> AbstractMesh:
        return AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))


@dataclass(frozen=True)
class Trees:
    """The abstract trees of a job. Arrays carry their shardings where a mesh was given."""

    model: Model
    trainable: Any
    frozen: Any
    state: Any
    batch: dict[str, Any]
    tx: optax.GradientTransformation = field(repr=False)


def model_of(job: Job) -> Model:
    return Model.abstract(job.config, jnp.dtype(job.dtype), remat=job.remat)


def adapted(job: Job) -> Any:
    """The tree with what the method lets train, abstract."""
    model = model_of(job)
    ids = (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
    params: Any = model.params
    if job.method == "qlora":
        params = quantize(params, fn=model.apply, args=ids, platform=job.target.chip.platform)
    if job.method in ("full", "head"):
        spec = LoraSpec(targets=(), train_also="*" if job.method == "full" else "lm_head/*")
    else:
        targets = job.targets[0] if len(job.targets) == 1 else job.targets
        spec = LoraSpec(targets=targets, rank=job.rank)
    return adapt(jax.random.key(0), params, spec, fn=model.apply, args=ids)


def trees(job: Job, mesh: Any = None) -> Trees:
    """All that goes into a step, abstract, as it would lie on a mesh (by default the job's, without devices)."""
    mesh = job.abstract_mesh() if mesh is None else mesh
    params = shard(adapted(job), mesh)
    trainable, frozen = split(params)
    tx = in_float32(adamw8bit(1e-3) if job.optimizer == "adamw8bit" else optax.adamw(1e-3))
    state = jax.eval_shape(lambda t: init_state(t, tx, 0), trainable)
    places = follow(state, trainable, shardings(trainable, mesh), mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    rows = batch_axes(mesh.axis_names) or None
    place = NamedSharding(mesh, PartitionSpec(None, rows, None))
    shape = (1, job.batch, job.seq)
    names = ("ids", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    even = "model" in mesh.axis_names and job.base.hidden_size % job.tensor_parts == 0
    stream = NamedSharding(mesh, PartitionSpec(rows, "model" if even else None))
    model = dataclasses.replace(model_of(job), params={}, stream=stream)
    return Trees(model, trainable, frozen, state, batch, tx)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation in float32 whatever the weights are: moments in bf16 swallow small steps."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)


def total_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, over the whole job."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def chip_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one chip, by their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
