"""The other side of the comparison: a LoRA step by Hugging Face PEFT on torch, as its users write it.

Run by a Python that has torch, transformers and peft; it knows nothing of lorax. Requests are lines of JSON.
"""

import json
import os
import sys
import time


def serve(operations):
    """Answer lines of JSON until the input ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = operations[request.pop("op")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def memory():
    """Bytes resident now, and the most since `reset_peak`."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {key: int(fields[name].split()[0]) * 1024 for key, name in (("rss", "VmRSS"), ("peak", "VmHWM"))}


def reset_peak():
    """Count the peak from here on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory()


class Side:
    """The model, its optimizer and a batch."""

    def load(self, base, threads, batch, length, seed, quantised=False):
        """Read the base (in 4 bits, by bitsandbytes) and touch all of it, so that what comes after is not the base."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import numpy
        import peft  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.torch, self.peft = torch, peft
        four_bit = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        more = {"quantization_config": four_bit, "device_map": "cpu"} if quantised else {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **more)
        vocab = self.model.config.vocab_size
        ids = numpy.random.default_rng(seed).integers(0, vocab, (batch, length))
        self.ids = torch.tensor(ids, dtype=torch.long)
        total = sum(float(p.detach().sum()) for p in self.model.parameters())
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        if quantised:
            import bitsandbytes  # pyright: ignore[reportMissingImports]

            versions["bitsandbytes"] = bitsandbytes.__version__
        return {"sum": total, "versions": versions, "threads": torch.get_num_threads(), **memory()}

    def prepare(self, what, rank, alpha, lr):
        """Factors on every linear map, AdamW on the factors, one step to warm up."""
        del what
        settings = self.peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = self.peft.get_peft_model(self.model, settings).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        return {"parameters": sum(p.numel() for p in trained), **self.run("lora")}

    def run(self, what):
        """One step."""
        del what
        begin = time.perf_counter()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        return {"seconds": time.perf_counter() - begin, "loss": value}


if __name__ == "__main__":
    side = Side()
    serve({"load": side.load, "prepare": side.prepare, "run": side.run, "memory": memory, "reset_peak": reset_peak})
