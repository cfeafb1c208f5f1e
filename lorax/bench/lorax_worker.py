"""Our side of the comparison: the training step that `lorax train` runs, and what it is compared with here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorax.bench import side
from lorax.bench.flops import lora_products
from lorax.bench.peft_worker import memory, reset_peak, serve


class Side(side.Side):
    """The steps and forwards of one model."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: dict[str, Any] = {}

    def load(self, base: str, threads: int, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Read the base and touch all of it; draw the batch: every token but the last of a row has a target."""
        ids = self.read(base, threads, batch, length, seed)
        import jax
        import jax.numpy as jnp
        import numpy as np

        weights = np.ones((batch, length), np.float32)
        weights[:, -1] = 0.0
        self.batch = {
            "ids": ids,
            "targets": np.roll(ids, -1, axis=1),
            "weights": weights,
            "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
            "segment_ids": np.ones((batch, length), np.int32),
        }
        self.batch = {name: jnp.asarray(value) for name, value in self.batch.items()}
        leaves = jax.tree.leaves(self.model.params)
        total = sum(float(np.asarray(x).sum(dtype=np.float64)) for x in leaves)
        sizes = {"weights": sum(x.size for x in leaves), "bytes": sum(x.nbytes for x in leaves)}
        return {"sum": total, **sizes, **self.about()}

    def prepare(self, what: str, rank: int, alpha: float, lr: float) -> dict[str, Any]:
        """Compile a program and run it once."""
        build = self._step if what in ("lora", "qlora", "full") else self._forward
        self.programs[what], more = build(what, rank, alpha, lr)
        return {**more, **self.run(what)}

    def run(self, what: str) -> dict[str, Any]:
        """One run of a program."""
        seconds, value = self.timed(what)
        return {"seconds": seconds, "loss": float(value)}

    def rates(self, batch: int, length: int, rank: int, least: float) -> dict[str, Any]:
        """Seconds that the products of a LoRA step take one by one, and the rate of the fastest kind.

        Products that do less than `least` of the step's work count at the rate of the others: timing them one by
        one would time the call.
        """
        products = lora_products(self.model.config, batch, length, rank)
        total = sum(p.flops for p in products)
        seconds, flops, best = 0.0, 0, 0.0
        shapes: dict[tuple[int, int, int], float] = {}
        for p in products:
            if p.flops < least * total:
                continue
            shape = (p.rows, p.inner, p.columns)
            if shape not in shapes:
                shapes[shape] = self._product(*shape)
            seconds, flops = seconds + shapes[shape] * p.times, flops + p.flops
            best = max(best, p.flops / p.times / shapes[shape])
        return {"flops": total, "timed": flops / total, "rate": flops / seconds, "best_rate": best}

    def _product(self, rows: int, inner: int, columns: int) -> float:
        """Seconds of one product (rows, inner) x (inner, columns), the faster half's median."""
        import jax
        import numpy as np

        key = ("product", rows, inner, columns)
        if str(key) not in self.programs:
            a, b = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
            a, b = jax.device_put(a), jax.device_put(b)
            compiled = jax.jit(lambda a, b: a @ b)
            self.programs[str(key)] = lambda: jax.block_until_ready(compiled(a, b))
            self.programs[str(key)]()
        program, times = self.programs[str(key)], []
        for _ in range(5):
            begin = time.perf_counter()
            program()
            times.append(time.perf_counter() - begin)
        return sorted(times)[1]

    def _step(self, what: str, rank: int, alpha: float, lr: float) -> tuple[Callable[[], Any], dict[str, Any]]:
        import jax

        from lorax import split
        from lorax.train.config import TrainConfig
        from lorax.train.methods import adapted, head_trains
        from lorax.train.objective import language_model_loss, make_optimizer
        from lorax.train.step import init_state, make_step

        config = TrainConfig(method="full" if what == "full" else "lora", rank=rank, alpha=alpha, lr=lr, clip=0.0)
        model, params = adapted(self._base(what), config)
        trainable, frozen = split(params)
        tx, _ = make_optimizer(config, 1000)
        loss = language_model_loss(model, head_trains=head_trains(trainable, model.config))
        state, batches = init_state(trainable, tx, 0), jax.tree.map(lambda x: x[None], self.batch)
        count = sum(x.size for x in jax.tree.leaves(trainable))
        del params, trainable
        compiled = make_step(loss, tx).lower(state, frozen, batches).compile()
        box = [state]
        del state

        def program() -> Any:
            box[0], metrics = compiled(box[0], frozen, batches)
            return metrics.loss

        return program, {"parameters": count, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}

    def _base(self, what: str) -> Any:
        """The model, with its linear weights in NF4 for `qlora`."""
        if what != "qlora":
            return self.model
        from lorax import quantize

        return replace(self.model, params=quantize(self.model.params, fn=self.model.apply, args=(self.batch["ids"],)))

    def _forward(self, what: str, rank: int, alpha: float, lr: float) -> tuple[Callable[[], Any], dict[str, Any]]:
        """`forward` or `features` (without the head), with `+lora` over an adapted tree."""
        import jax

        from lorax import lift
        from lorax.train.config import TrainConfig
        from lorax.train.methods import adapted

        name, _, with_lora = what.partition("+")
        function = self.model.apply if name == "forward" else self.model.hidden
        params = self.model.params
        if with_lora:
            params = adapted(self.model, TrainConfig(rank=rank, alpha=alpha, lr=lr))[1]
            function = lift(function)
        compiled = jax.jit(function)
        ids = self.batch["ids"]
        return lambda: compiled(params, ids)[0, 0, 0], {}


def main() -> None:
    side = Side()
    names = ("save", "load", "prepare", "run", "rates")
    serve({**{name: getattr(side, name) for name in names}, "memory": memory, "reset_peak": reset_peak})


if __name__ == "__main__":
    main()
