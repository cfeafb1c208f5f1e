"""Our side of `lorax bench methods`: one process, the steps of all ways to fine-tune over one batch of a demo task."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorax.bench.peft_worker import memory, reset_peak, serve

# name -> settings of the run whose step it is
STEPS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "last-2": {"method": "last-k", "last_k": 2},
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "variant": "dora"},
    "head": {"method": "head"},
    "classification head": {"method": "head", "head": "classification"},
    "dpo": {"method": "lora", "loss": "dpo"},
}


class Side:
    """A model, the programs that were asked for, by name, and what each trains."""

    def __init__(self) -> None:
        self.model: Any = None
        self.config: Any = None
        self.programs: dict[str, Callable[[], Any]] = {}
        self.data: dict[tuple[str, str], Any] = {}

    def load(self, base: str, task: str, threads: int, batch: int, rank: int, seed: int) -> dict[str, Any]:
        """Read the base; settle what all the runs have in common."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        from lorax.models import load
        from lorax.train.config import TrainConfig
        from lorax.train.runtime import keep_compiled_programs

        keep_compiled_programs()
        self.model = load(base)
        kind: dict[str, Any] = {"task": task} if "/" not in task else {"data": task}
        usual: dict[str, Any] = {"base": base, "batch_size": batch, "seq_len": 512, "rank": rank, "seed": seed}
        self.config = TrainConfig(**usual, **kind, lr=1e-4, clip=0.0, eval_items=1)
        return {"threads": len(os.sched_getaffinity(0)), **memory()}

    def prepare(self, what: str) -> dict[str, Any]:
        """Compile a step and take it once."""
        import jax

        from lorax import split
        from lorax.models import with_labels
        from lorax.train.dataset import prepare
        from lorax.train.methods import adapted, head_trains, only_head
        from lorax.train.objective import loss_for, make_optimizer
        from lorax.train.step import init_state, make_step

        config = replace(self.config, **STEPS[what])
        kind, model = (config.head, config.loss), self.model
        if kind not in self.data:
            # Reading a task takes as long as compiling a step, and most steps read the same.
            self.data[kind] = prepare(config, model.tokenizer, lambda line: None)
        data = self.data[kind]
        if data.labels:
            model = with_labels(model, data.labels, jax.random.key(0))
        own, params = adapted(model, config)
        trainable, frozen = split(params)
        batch = next(data.stream(config))
        rows = next(iter(batch.values())).shape[0]
        if only_head(trainable):
            batch = self._features(model, data, config)
        tx, _ = make_optimizer(config, 1000)
        step = make_step(loss_for(own, config, head_trains=head_trains(trainable, own.config)), tx)
        state, batches = init_state(trainable, tx, 0), jax.tree.map(lambda x: x[None], batch)
        count = sum(x.size for x in jax.tree.leaves(trainable))
        del params, trainable
        box = [state]

        def program() -> Any:
            box[0], metrics = step(box[0], frozen, batches)
            return metrics.loss

        self.programs[what] = program
        shape = list(next(iter(batch.values())).shape)
        return {"parameters": count, "rows": rows, "shape": shape, **self.run(what)}

    def _features(self, model: Any, data: Any, config: Any) -> dict[str, Any]:
        """The first batch by its features. They are those of these examples alone: a step needs no others."""
        from lorax.data import Examples
        from lorax.train.features import cached

        (rows,) = [data.stream(config).next_rows()]
        few = Examples.of(data.train[i] for row in rows for i in row)
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
            found = cached(model, {"train": few}, {}, Path(folder), **sizes)["train"]
            return found.batch([[i] for i in range(len(few))], found.widest)

    def run(self, what: str) -> dict[str, Any]:
        """One step."""
        begin = time.perf_counter()
        value = float(self.programs[what]())
        return {"seconds": time.perf_counter() - begin, "loss": value}

    def forget(self, what: str) -> dict[str, Any]:
        """Give a step's memory back."""
        self.programs.pop(what, None)
        return {}

    def analysis(self, rank: int, targets: str = "all-linear") -> dict[str, Any]:
        """All figures but the intruders of an adapter of this rank, with B drawn; compile time included."""
        import jax
        import jax.numpy as jnp

        from lorax import LoraSpec, adapt, join, split
        from lorax.analysis import analyze

        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        spec = LoraSpec(targets=targets, rank=rank)
        tree = adapt(jax.random.key(0), self.model.params, spec, fn=self.model.apply, args=(ids,))
        trainable, frozen = split(tree)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))
        moved = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(next(keys), x.shape), trainable)
        tree = jax.block_until_ready(join(moved, frozen))
        begin = time.perf_counter()
        found = analyze(self.model.params, tree)
        found.as_dict()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "changed": sum(row.changed for row in found.rows), "matrices": len(found.rows)}


def main() -> None:
    side = Side()
    names = ("load", "prepare", "run", "forget", "analysis")
    serve({**{name: getattr(side, name) for name in names}, "memory": memory, "reset_peak": reset_peak})


if __name__ == "__main__":
    main()
