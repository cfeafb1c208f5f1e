"""Our side of the NF4 benchmark: the operations that a quantised weight goes through, in a process of their own."""

from __future__ import annotations

import os
import time
from typing import Any

from lorax.bench.peft_worker import serve


class Side:
    """A weight, its 4-bit form, activations, and compiled programs by name."""

    def load(self, threads: int, size: int, rows: list[int], seed: int) -> dict[str, Any]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import jax
        import jax.numpy as jnp
        import numpy as np

        from lorax_kernels import nf4, nf4_matmul

        rng = np.random.default_rng(seed)
        weight = jnp.asarray(rng.standard_normal((size, size), dtype=np.float32))
        activations = {n: jnp.asarray(rng.standard_normal((n, size), dtype=np.float32)) for n in rows}
        q = nf4.quantize(weight)
        one_level = nf4.quantize(weight, double_quant=False)
        # The last result is given back as the next one's buffer: no fresh pages.
        into = jax.jit(lambda q, _: nf4.dequantize(q), donate_argnums=1, keep_unused=True)
        plus = jax.jit(lambda w, _: w + 1, donate_argnums=1, keep_unused=True)
        product = jax.jit(nf4_matmul.matmul)
        boxes = [jnp.zeros_like(weight), jnp.zeros_like(weight)]

        def reuse(box: int, function: Any, argument: Any) -> Any:
            boxes[box] = function(argument, boxes[box])
            boxes[box].block_until_ready()
            return boxes[box][:1] if box == 0 else boxes[box][:1, :1]

        self.operations: dict[str, Any] = {
            "quantise": lambda: nf4.quantize(weight).codes,
            "dequantise": lambda: reuse(0, into, one_level),
            "x+1": lambda: reuse(1, plus, weight),
            **{f"matmul {n}": lambda x=x: product(x, q) for n, x in activations.items()},
        }
        return {"threads": len(os.sched_getaffinity(0))}

    def run(self, what: str) -> dict[str, Any]:
        """One operation; the time and a number that both sides must agree on."""
        import jax
        import numpy as np

        begin = time.perf_counter()
        result = jax.block_until_ready(self.operations[what]())
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "check": float(np.abs(np.asarray(result, np.float32)).mean())}


def main() -> None:
    side = Side()
    serve({"load": side.load, "run": side.run})


if __name__ == "__main__":
    main()
