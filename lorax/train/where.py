"""Where a run happens: one device, or a mesh over the devices of one process or many.

The runner asks here how the model, its parameters, the state and the batches lie; it is the same program for both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lorax.distributed import batch_sharding, from_local_rows, gather, local_rows
from lorax.errors import LoraxError
from lorax.sharding import batch_axes, follow, put, shard, shardings
from lorax.train.config import TrainConfig
from lorax.train.step import Batch, State, init_state


@dataclass(frozen=True)
class Where:
    """One device (`mesh` is None), or a mesh."""

    mesh: Mesh | None = None

    def check(self, config: TrainConfig) -> None:
        """Refuse what a mesh cannot do.

        Raises:
            LoraxError: names the setting.
        """
        if self.mesh is None:
            return
        if config.paged:
            raise LoraxError("--paged: keeps the optimizer's state in one host's memory; leave it out with --mesh")
        if config.loss != "sft" or config.head != "lm":
            what = f"--loss {config.loss}" if config.loss != "sft" else f"--head {config.head}"
            raise LoraxError(f"{what}: runs on one device; leave --mesh out")
        if config.batch_size % self.parts:
            raise LoraxError(
                f"--batch-size {config.batch_size}: does not divide over the {self.parts} parts of it on the mesh"
            )

    @property
    def parts(self) -> int:
        """How many parts the batch is split into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in batch_axes(self.mesh.axis_names))

    def loading(self) -> contextlib.AbstractContextManager[Any]:
        """Where whole weights are while they are read: in the host's memory, when they will be split over a mesh."""
        if self.mesh is None:
            return contextlib.nullcontext()
        try:
            return jax.default_device(jax.local_devices(backend="cpu")[0])
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
            return contextlib.nullcontext()

    def model(self, model: Any) -> Any:
        """The model, its stream between layers laid over the mesh."""
        if self.mesh is None:
            return model
        tensor = "model" if "model" in self.mesh.axis_names else None
        even = tensor and model.config.hidden_size % self.mesh.shape[tensor] == 0
        spec = PartitionSpec(batch_axes(self.mesh.axis_names) or None, tensor if even else None)
        return dataclasses.replace(model, stream=NamedSharding(self.mesh, spec))

    def params(self, params: PyTree) -> PyTree:
        """Weights where the table of rules says; every process passes the same ones."""
        return params if self.mesh is None else shard(params, self.mesh)

    def state(self, trainable: PyTree, tx: optax.GradientTransformation, seed: int) -> State:
        """The state before the first step, moments beside the weights that they belong to."""
        if self.mesh is None:
            return init_state(trainable, tx, seed)
        make: Callable[[PyTree], State] = lambda t: init_state(t, tx, seed)  # noqa: E731
        places = shardings(trainable, self.mesh)
        return jax.jit(make, out_shardings=follow(jax.eval_shape(make, trainable), trainable, places, self.mesh))(
            trainable
        )

    def rows(self, count: int) -> slice | None:
        """The rows of a training batch that this process reads; None for all."""
        return None if self.mesh is None else local_rows(batch_sharding(self.mesh), count)

    def batch(self, batch: Batch, count: int) -> Batch:
        """Stacked micro-batches `(accumulate, rows, width)` of this process as global ones of `count` rows."""
        return batch if self.mesh is None else from_local_rows(batch, batch_sharding(self.mesh, axis=1), count, axis=1)

    def scorer(self, score: Callable[..., Any]) -> Callable[..., Any]:
        """A scorer whose batches every process has whole, and whose answers every process gets."""
        if self.mesh is None:
            return score
        mesh, rows = self.mesh, batch_sharding(self.mesh)
        everywhere = jax.jit(lambda found: found, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return lambda params, batch: everywhere(score(params, {name: put(x, rows) for name, x in batch.items()}))

    def trained(self, state: State) -> State:
        """The state with what trained, and its receipts, in this process's memory."""
        if self.mesh is None:
            return state
        return state._replace(trainable=gather(state.trainable), receipts=gather(state.receipts))

    def whole(self, params: PyTree) -> PyTree:
        """The tree in this process's memory: what trained, and the base, of which an adapter's file keeps samples."""
        return params if self.mesh is None else gather(params)
