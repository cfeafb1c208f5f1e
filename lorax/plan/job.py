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

from lorax import LoraSpec, adapt, attach, bank_optimizer, extract, quantize, split, stack
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig
from lorax.multi import bank_state_shardings
from lorax.optim import adamw8bit
from lorax.plan.target import Target
from lorax.sharding import batch_axes, follow, shard, shardings
from lorax.train.step import State, init_state

CHUNK = 512
METHODS = ("lora", "qlora", "multi-lora", "multi-qlora", "full", "head")
VARIANTS = ("lora", "dora", "lora-fa", "vera")


@dataclass(frozen=True)
class Job:
    """What would be run.

    base: shape of the model.
    method: `"lora"`, `"qlora"`, `"full"`, `"head"`; or `"multi-lora"` and `"multi-qlora"`: many adapters trained
        together in one mixed batch, each row of it for one of them.
    target: the chips; mesh: axis -> size over them.
    rank, targets, variant: of the low-rank changes.
    adapters: how many are trained together, or served.
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
    variant: str = "lora"
    adapters: int = 64
    seq: int = 4096
    batch: int = 16
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    remat: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LoraxError(f"--method {self.method}: choose one of {', '.join(METHODS)}")
        if self.variant not in VARIANTS:
            raise LoraxError(f"--variant {self.variant}: choose one of {', '.join(VARIANTS)}")
        if self.mixed and (self.variant != "lora" or self.optimizer != "adamw"):
            raise LoraxError(f"--method {self.method}: trains plain low-rank changes with adamw; leave the others out")
        for name in ("rank", "seq", "batch", "adapters"):
            if getattr(self, name) < 1:
                raise LoraxError(f"--{name} {getattr(self, name)}: must be at least 1")

    @property
    def mixed(self) -> bool:
        """Whether many adapters train together."""
        return self.method.startswith("multi-")

    @property
    def low_rank(self) -> bool:
        """Whether low-rank changes train, of one adapter or many."""
        return self.method.endswith("lora")

    @property
    def packed(self) -> bool:
        """Whether the base is in 4 bits."""
        return self.method.endswith("qlora")

    @property
    def config(self) -> ModelConfig:
        """The model's shape; a head that trains is its own, not the embedding's transpose."""
        return dataclasses.replace(self.base, tie_embeddings=False) if self.method == "head" else self.base

    @property
    def chunk(self) -> int:
        """Rows of logits alive at once on a chip: few large products on chips, which have no cache to stay in."""
        rows = self.batch // self.data_parts
        # A mixed batch has a loss for each row, and so a chunk of each at once.
        return min(max(CHUNK // rows, 1), self.seq) if self.mixed else min(CHUNK, self.seq * rows)

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
    tx: Any = field(repr=False)


def model_of(job: Job) -> Model:
    return Model.abstract(job.config, jnp.dtype(job.dtype), remat=job.remat)


def adapted(job: Job) -> Any:
    """The tree with what the method lets train, abstract."""
    model = model_of(job)
    ids = (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
    params: Any = model.params
    if job.packed:
        params = quantize(params, fn=model.apply, args=ids, platform=job.target.chip.platform)
    if job.method in ("full", "head"):
        spec = LoraSpec(targets=(), train_also="*" if job.method == "full" else "lm_head/*")
    else:
        targets = job.targets[0] if len(job.targets) == 1 else job.targets
        spec = LoraSpec(targets=targets, rank=job.rank, variant=job.variant)
    made = adapt(jax.random.key(0), params, spec, fn=model.apply, args=ids)
    return attach(params, bank(job, made)) if job.mixed else made


def bank(job: Job, made: Any) -> Any:
    """A bank of the job's adapters, all like the one of an adapted tree, abstract."""
    return jax.eval_shape(lambda one: stack([one] * job.adapters), extract(made))


def trees(job: Job, mesh: Any = None) -> Trees:
    """All that goes into a step, abstract, as it would lie on a mesh (by default the job's, without devices)."""
    mesh = job.abstract_mesh() if mesh is None else mesh
    params = shard(adapted(job), mesh)
    trainable, frozen = split(params)
    if job.mixed:
        return _mixed(job, mesh, params, trainable, frozen)
    tx = in_float32(adamw8bit(1e-3) if job.optimizer == "adamw8bit" else optax.adamw(1e-3))
    state = jax.eval_shape(lambda t: init_state(t, tx, 0), trainable)
    places = follow(state, trainable, shardings(trainable, mesh), mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    rows = batch_axes(mesh.axis_names) or None
    batch = _batch(NamedSharding(mesh, PartitionSpec(None, rows, None)), (1, job.batch, job.seq))
    return Trees(_model(job, mesh, rows), trainable, frozen, state, batch, tx)


def _mixed(job: Job, mesh: Any, params: Any, trainable: Any, frozen: Any) -> Trees:
    """The trees of a step that trains a bank: a row of the batch is an example, with an adapter's number."""
    tx = bank_optimizer(optax.adamw, params, 1e-3)
    kept = jax.eval_shape(tx.init, params)
    places = bank_state_shardings(kept, params, mesh)
    kept = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), kept, places)
    rows = batch_axes(mesh.axis_names) or None
    batch = _batch(NamedSharding(mesh, PartitionSpec(rows, None)), (job.batch, job.seq))
    each = NamedSharding(mesh, PartitionSpec(rows))
    batch["adapter"] = jax.ShapeDtypeStruct((job.batch,), jnp.int32, sharding=each)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), trainable, kept, None, None)  # pyright: ignore[reportArgumentType]
    return Trees(_model(job, mesh, None), trainable, frozen, state, batch, tx)


def _batch(place: NamedSharding, shape: tuple[int, ...]) -> dict[str, Any]:
    names = ("ids", "targets", "positions", "segment_ids")
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name in names}
    return {**batch, "weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}


def _model(job: Job, mesh: Any, rows: Any) -> Model:
    """The model as code, its stream between layers laid over the mesh."""
    even = "model" in mesh.axis_names and job.base.hidden_size % job.tensor_parts == 0
    stream = NamedSharding(mesh, PartitionSpec(rows, "model" if even else None))
    return dataclasses.replace(model_of(job), params={}, stream=stream)


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
