"""Our side of `lorax bench multi`: forwards with many adapters in one batch, and training them together or in turn."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

from lorax.bench import side
from lorax.bench.peft_worker import serve

# Adapters take these ranks in turn.
RANKS = (4, 8, 16, 32, 64)
# The bank of a thousand adapters must fit into a laptop's memory: PEFT's own default targets.
FEW_TARGETS = ("*/q_proj/kernel", "*/v_proj/kernel")


class Side(side.Side):
    """Forwards over banks, and training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Any = None

    def load(self, base: str, threads: int, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Read the base and draw the batch."""
        import jax.numpy as jnp

        self.ids = jnp.asarray(self.read(base, threads, batch, length, seed))
        return self.about()

    def prepare(self, what: str, adapters: int = 0, targets: str = "all") -> dict[str, Any]:
        """Compile a forward (of the base alone, or of a bank) and run it once."""
        import jax
        import jax.numpy as jnp

        import lorax

        apply = self.model.apply
        if not adapters:
            compiled = jax.jit(apply)
            self.programs[what] = lambda: compiled(self.model.params, self.ids)
            return self.run(what)
        bank = lorax.attach(self.model.params, lorax.stack(self._adapters(adapters, targets)))
        rows = self.ids.shape[0]
        chosen = jnp.asarray([choice(i, rows, adapters) for i in range(rows)], jnp.int32)

        @jax.jit
        def mixed(params: Any, chosen: Any, ids: Any) -> Any:
            one = lambda i, row: lorax.lift(apply)(lorax.select(params, i), row[None])[0]  # noqa: E731
            return jax.vmap(one)(chosen, ids)

        self.programs[what] = lambda: mixed(bank, chosen, self.ids)
        size = sum(x.nbytes for x in jax.tree.leaves(lorax.split(bank)[0]))
        return {"bytes": size, "different": len(set(chosen.tolist())), **self.run(what)}

    def run(self, what: str) -> dict[str, Any]:
        """One forward."""
        seconds, out = self.timed(what)
        return {"seconds": seconds, "check": float(out[0, -1, :8].sum())}

    def _adapters(self, count: int, targets: str) -> dict[str, Any]:
        """Adapters with non-zero B, under as many names as are asked for; of a large bank many are alike."""
        import jax

        import lorax

        chosen = "all-linear" if targets == "all" else FEW_TARGETS
        made = []
        for i in range(min(count, 40 if targets == "all" else len(RANKS))):
            spec = lorax.LoraSpec(targets=chosen, rank=RANKS[i % len(RANKS)])
            tree = lorax.extract(lorax.adapt(jax.random.key(i), self.model.params, spec))
            trained, frozen = lorax.split(tree)
            made.append(lorax.join(jax.tree.map(lambda x: x + x.dtype.type(0.001), trained), frozen))
        return {str(i): made[i % len(made)] for i in range(count)}

    def together(self, adapters: int, examples: int, length: int, steps: int, seed: int) -> dict[str, Any]:
        """Train all in one batch, compile time included."""
        import jax
        import jax.numpy as jnp
        import optax

        import lorax

        params = lorax.attach(self.model.params, lorax.stack(self._adapters(adapters, "all")))
        data = self._data(adapters, examples, length, seed).reshape(adapters * examples, length)
        chosen = jnp.repeat(jnp.arange(adapters, dtype=jnp.int32), examples)
        jax.clear_caches()
        begin = time.perf_counter()
        tx = lorax.bank_optimizer(optax.adam, params, 1e-4)
        step = jax.jit(lorax.bank_step(self._loss, tx), donate_argnums=1)
        state, losses = tx.init(params), None
        clock = Clock(begin)
        for _ in range(steps):
            params, state, losses = step(params, state, chosen, data)
            clock.step(losses)
        values = [float(x) for x in losses] if losses is not None else []
        return {**clock.said(), "losses": values}

    def alone(self, which: int, adapters: int, examples: int, length: int, steps: int, seed: int) -> dict[str, Any]:
        """Train one of them in a run of its own, compile time included."""
        import jax
        import jax.numpy as jnp
        import optax

        import lorax

        tree = self._adapters(which + 1, "all")[str(which)]
        data = self._data(adapters, examples, length, seed)[which]
        trained, frozen = lorax.split(lorax.attach(self.model.params, tree))
        jax.clear_caches()
        begin = time.perf_counter()
        tx = optax.adam(1e-4)

        def step(trained: Any, state: Any, frozen: Any, data: Any) -> Any:
            def total(trained: Any) -> jax.Array:
                params = lorax.join(trained, frozen)
                sums, counts = jax.vmap(lambda row: self._loss(params, row))(data)
                return jnp.sum(sums) / jnp.sum(counts)

            value, gradients = jax.value_and_grad(total)(trained)
            moved, state = tx.update(gradients, state, trained)
            return optax.apply_updates(trained, moved), state, value

        compiled, state, value = jax.jit(step, donate_argnums=(0, 1)), tx.init(trained), None
        trained = jax.tree.map(lambda x: x.copy(), trained)
        clock = Clock(begin)
        for _ in range(steps):
            trained, state, value = compiled(trained, state, frozen, data)
            clock.step(value)
        return {**clock.said(), "loss": float(value) if value is not None else None}

    def _data(self, adapters: int, examples: int, length: int, seed: int) -> Any:
        import jax.numpy as jnp
        import numpy as np

        shape = (adapters, examples, length)
        drawn = np.random.default_rng(seed).integers(0, self.model.config.vocab_size, shape)
        return jnp.asarray(drawn, jnp.int32)

    def _loss(self, params: Any, row: Any) -> Any:
        """Sum and count of the cross-entropy of a row's next tokens."""
        import jax.numpy as jnp
        import optax

        import lorax

        logits = lorax.lift(self.model.apply)(params, row[None])[0]
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits[:-1], row[1:])
        return jnp.sum(each), jnp.float32(each.shape[0])


class Clock:
    """Times of a training run: all of it, the first step with what came before it (compiling), a later step."""

    def __init__(self, begin: float) -> None:
        self.times = [begin]

    def step(self, value: Any) -> None:
        """A step is done once its value is there."""
        import jax

        jax.block_until_ready(value)
        self.times.append(time.perf_counter())

    def said(self) -> dict[str, float]:
        """`seconds` of the run, of its `first` step and, as a median, of a later `step` (the first, if it is alone)."""
        each = [after - before for before, after in pairwise(self.times)]
        return {"seconds": self.times[-1] - self.times[0], "first": each[0], "step": median(each[1:] or each)}


def choice(row: int, rows: int, adapters: int) -> int:
    """The adapter of a row: different ones far apart in a large bank, and the same ranks whatever the bank's size."""
    kinds = len(RANKS)
    if adapters <= rows:
        return row % adapters
    return (7 * (row // kinds)) % (adapters // kinds) * kinds + row % kinds


def main() -> None:
    side = Side()
    names = ("save", "load", "prepare", "run", "forget", "together", "alone")
    serve({name: getattr(side, name) for name in names})


if __name__ == "__main__":
    main()
