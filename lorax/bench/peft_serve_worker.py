"""The other side of `lorax bench serve`: `generate` of transformers with PEFT's mixed batch (`adapter_names`).

Run by a Python that has torch, transformers and peft; it knows nothing of lorax. It reads the same base and the same
adapters' files.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from peft_worker import memory, serve  # pyright: ignore[reportMissingImports]


class Side:
    """The model with adapters."""

    def load(self, folder, targets, adapters, threads):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        import peft  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        self.torch = torch
        base = os.path.join(folder, "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        places = [os.path.join(folder, f"{targets}-{i}") for i in range(adapters)]
        self.model = peft.PeftModel.from_pretrained(model, places[0], adapter_name="a0")
        for i, place in enumerate(places[1:], 1):
            self.model.load_adapter(place, adapter_name=f"a{i}")
        self.model.eval()
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        return {"versions": versions, "threads": torch.get_num_threads(), **memory()}

    def together(self, prompts, adapters, answer):
        """A batch of prompts of one length, `answer` tokens each; row i has adapter i modulo `adapters`.

        The first token comes from reading the prompt: decoding is timed from there, as on our side.
        """
        torch = self.torch
        ids = torch.tensor(prompts, dtype=torch.long)
        names = [f"a{i % adapters}" for i in range(len(prompts))]
        seconds, rows = {}, None
        for tokens in (1, answer):
            begin = time.perf_counter()
            with torch.no_grad():
                rows = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    adapter_names=names,
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    pad_token_id=0,
                )
            seconds[tokens] = time.perf_counter() - begin
        decoding = seconds[answer] - seconds[1]
        count = len(prompts)
        return {
            "seconds": seconds[answer],
            "tokens_per_second": count * answer / seconds[answer],
            "decode_tokens_per_second": count * (answer - 1) / decoding,
            "tokens": rows[:, len(prompts[0]) :].tolist(),
        }


if __name__ == "__main__":
    side = Side()
    serve({"load": side.load, "together": side.together})
