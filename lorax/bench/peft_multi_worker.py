"""The other side of `lorax bench multi`: PEFT's mixed batch (`adapter_names`), and a training run of its own.

Run by a Python that has torch, transformers and peft; it knows nothing of lorax.
"""

import os
import sys
import time
from itertools import pairwise

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from peft_worker import memory, serve  # pyright: ignore[reportMissingImports]

RANKS = (4, 8, 16, 32, 64)


class Side:
    """The model with adapters."""

    def load(self, base, threads, batch, length, seed):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import numpy
        import peft  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.torch, self.peft, self.base = torch, peft, base
        self.read = lambda: transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = self.read()
        self.vocab = self.model.config.vocab_size
        drawn = numpy.random.default_rng(seed).integers(0, self.vocab, (batch, length))
        self.ids = torch.tensor(drawn, dtype=torch.long)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        return {"versions": versions, "threads": torch.get_num_threads(), **memory()}

    def config(self, rank):
        return self.peft.LoraConfig(
            r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )

    def prepare(self, what, adapters=0, targets="all"):
        """`base`: no adapters. `mixed`: this many, one after the other over the batch."""
        del targets
        if what == "mixed":
            self.names = [f"a{i}" for i in range(adapters)]
            self.model = self.peft.get_peft_model(self.model, self.config(RANKS[0]), adapter_name="a0")
            for i in range(1, adapters):
                self.model.add_adapter(f"a{i}", self.config(RANKS[i % len(RANKS)]))
        self.model.eval()
        return self.run(what)

    def run(self, what):
        more = {}
        if what == "mixed":
            more["adapter_names"] = [self.names[i % len(self.names)] for i in range(self.ids.shape[0])]
        begin = time.perf_counter()
        with self.torch.no_grad():
            out = self.model(input_ids=self.ids, use_cache=False, **more).logits
        return {"seconds": time.perf_counter() - begin, "check": float(out[0, -1, :8].sum())}

    def alone(self, which, adapters, examples, length, steps, seed):
        """One training run: factors on every linear map, Adam."""
        import numpy

        shape = (adapters, examples, length)
        data = numpy.random.default_rng(seed).integers(0, self.vocab, shape)[which]
        ids = self.torch.tensor(data, dtype=self.torch.long)
        model = self.peft.get_peft_model(self.read(), self.config(RANKS[which % len(RANKS)])).train()
        times = [time.perf_counter()]
        optimizer = self.torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        value = None
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            times.append(time.perf_counter())
        each = sorted(after - before for before, after in pairwise(times[1:])) or [times[-1] - times[0]]
        whole = {"seconds": times[-1] - times[0], "first": times[1] - times[0], "step": each[len(each) // 2]}
        return {**whole, "loss": value}


if __name__ == "__main__":
    side = Side()
    serve({"load": side.load, "prepare": side.prepare, "run": side.run, "alone": side.alone})
