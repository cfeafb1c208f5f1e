"""Our side of `lorax bench serve`: an engine, adapters on the disk, and what is asked of both."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lorax.bench.peft_worker import memory, serve
from lorax.bench.serve_load import Arrival, Workload, draw, play, requests_of, summary

# Adapters take these ranks in turn.
RANKS = (4, 8, 16)
# PEFT's own default, S-LoRA's, and every linear map of a layer.
TARGETS = {
    "few": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


class Side:
    """A model, an engine over it, and a folder of adapters."""

    def __init__(self) -> None:
        self.model: Any = None
        self.engine: Any = None
        self.folder = Path()

    def open(self, base: str, folder: str, threads: int, export: bool) -> dict[str, Any]:
        """Read the base; write it as a Hugging Face directory too, if a peer wants to read it."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        from lorax.models import load, save_hf

        self.model, self.folder = load(base), Path(folder)
        if export:
            save_hf(self.folder / "base", self.model, self.model.params)
        return {"vocab": self.model.config.vocab_size, **memory()}

    def write(self, first: int, count: int, targets: str) -> dict[str, Any]:
        """Write adapters `first`..`first + count - 1` as PEFT does, drawn from their number."""
        size = 0
        for i in range(first, first + count):
            size += write_adapter(self.folder / f"{targets}-{i}", self.model.config, i, TARGETS[targets])
        return {"bytes": size}

    def start(self, batch: int, pool_adapters: int | None, pool_bytes: int, host_bytes: int, length: int) -> Any:
        """An engine of its own for each experiment, but where the one that is there is the same."""
        from lorax.models.resolve import cache_dir
        from lorax.serve import Engine, EngineConfig

        config = EngineConfig(
            max_batch=batch,
            max_length=length,
            pool_bytes=pool_bytes,
            pool_adapters=pool_adapters,
            max_rank=max(RANKS),
            max_queue=4096,
            host_bytes=host_bytes,
            # Prompts are drawn at random: a cache of their beginnings could only help where a round is repeated.
            prefix_cache=False,
            compiled=str(cache_dir() / "xla"),
        )
        if self.engine is not None and self.engine.config == config:
            return {"seconds": 0.0, **memory()}
        self.stop()
        begin = time.perf_counter()
        self.engine = Engine(self.model, config)
        self.engine.start()
        return {"seconds": time.perf_counter() - begin, **memory()}

    def stop(self) -> dict[str, Any]:
        """Close the engine and give its memory back."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        return memory()

    def load(self, count: int, targets: str) -> dict[str, Any]:
        """Register the adapters 0..count-1 of a kind."""
        begin, there = time.perf_counter(), {info.name for info in self.engine.adapters()}
        for name in (f"{targets}-{i}" for i in range(count)):
            if name not in there:
                self.engine.load(name, self.folder / name)
        return {"seconds": time.perf_counter() - begin, "registered": len(self.engine.adapters())}

    def together(self, adapters: int, targets: str, batch: int, prompt: int, answer: int, seed: int) -> dict[str, Any]:
        """A batch that runs from start to end: request i has adapter i modulo `adapters`; 0 is the base alone."""
        arrivals = full_batch(adapters, batch, prompt, answer, seed, self.model.config.vocab_size)
        return self._closed(arrivals, targets, None)

    def stream(self, load: dict[str, Any], targets: str, concurrency: int) -> dict[str, Any]:
        """A workload as fast as it goes, so many requests in flight: throughput."""
        arrivals = draw(workload(load), self.model.config.vocab_size)
        return self._closed(arrivals, targets, concurrency)

    def arrive(self, load: dict[str, Any], targets: str, slo_first: float, slo_each: float) -> dict[str, Any]:
        """A workload at its own times: latencies."""
        arrivals = draw(workload(load), self.model.config.vocab_size)
        seconds, usages = play(self.engine, arrivals, targets)
        return summary(seconds, usages, slo_first, slo_each)

    def swap(self, load: dict[str, Any], batch: int, targets: str) -> dict[str, Any]:
        """The workload by merging: adapters take turns in the base's weights, each answering those who wait for it.

        Requests are grouped by adapter over the whole workload, the kindest order there is. Compiling is left out.
        """
        import jax

        import lorax

        def weights(adapter: int | None) -> Any:
            place = self.folder / f"{targets}-{adapter}"
            return jax.block_until_ready(merge(lorax.load_adapter(place, self.model.params, check_base=False)))

        groups: dict[int | None, list[Arrival]] = {}
        for arrival in draw(workload(load), self.model.config.vocab_size):
            groups.setdefault(arrival.adapter, []).append(arrival)
        merge, programs = jax.jit(lorax.merge), self.engine.programs
        for rank in range(len(RANKS)):
            weights(rank)
        plain, merging, tokens, begin = programs.params, 0.0, 0, time.perf_counter()
        for adapter, group in groups.items():
            at = time.perf_counter()
            programs.params = weights(adapter)
            merging += time.perf_counter() - at
            alone = [Arrival(a.at, None, a.prompt, a.answer) for a in group]
            tokens += self._closed(alone, targets, batch)["generated_tokens"]
        seconds, programs.params = time.perf_counter() - begin, plain
        return {"seconds": seconds, "merging": merging, "swaps": len(groups), "tokens_per_second": tokens / seconds}

    def first_token(self, tier: str, targets: str, rounds: int, prompt: int) -> dict[str, Any]:
        """Time to first token of adapters that are on the device, in host memory, or on the disk alone.

        The engine's pool holds one adapter: whichever was asked for before has pushed the others out. The file
        system's cache is left as it is.
        """
        rng, times = np.random.default_rng(0), []
        for turn in range(rounds + 1):
            if tier != "device":
                self._first(rng, f"{targets}-{2 * turn + 1}", prompt)
            which = f"{targets}-{0 if tier == 'device' else 2 * turn}"
            found = self.engine.adapter(which).tier
            seconds = self._first(rng, which, prompt)
            if turn:
                assert found == tier, f"{which} is on {found}, and should be on {tier}"
                times.append(seconds)
        return {"median": median(times), "most": max(times)}

    def _first(self, rng: Any, which: str, prompt: int) -> float:
        kind, number = which.split("-")
        ids = tuple(int(i) for i in rng.integers(0, self.model.config.vocab_size, prompt))
        (request,) = requests_of([Arrival(0.0, int(number), ids, 2)], kind)
        return self.engine.submit(request).result().usage.first_token

    def _closed(self, arrivals: Sequence[Arrival], targets: str, concurrency: int | None) -> dict[str, Any]:
        from lorax.serve.measure import closed_loop

        before = self.engine.stats()
        found = closed_loop(self.engine, requests_of(arrivals, targets), concurrency)
        after = self.engine.stats()
        counted = ("loads_disk", "loads_device", "evictions_device", "preemptions", "compilations", "steps")
        return {
            "seconds": found.seconds,
            "tokens_per_second": found.tokens_per_second,
            "decode_tokens_per_second": found.decode_tokens_per_second,
            "generated_tokens": found.generated_tokens,
            "requests_per_second": len(arrivals) / found.seconds,
            "host_share": found.host_share,
            **{name: getattr(after, name) - getattr(before, name) for name in counted},
        }


def full_batch(adapters: int, batch: int, prompt: int, answer: int, seed: int, vocab: int) -> list[Arrival]:
    """Requests of one length, that begin and end together."""
    ids = np.random.default_rng(seed).integers(0, vocab, (batch, prompt))
    return [Arrival(0.0, i % adapters if adapters else None, tuple(map(int, row)), answer) for i, row in enumerate(ids)]


def workload(values: dict[str, Any]) -> Workload:
    """From JSON, which has lists for tuples."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Workload(**plain)


def write_adapter(folder: Path, config: Any, seed: int, modules: Sequence[str]) -> int:
    """An adapter of rank RANKS[seed], B not zero; its bytes. What is there already is left."""
    from safetensors.numpy import save_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        rank, rng, tensors = RANKS[seed % len(RANKS)], np.random.default_rng(seed), {}
        for layer in range(config.num_layers):
            for module in modules:
                outside, inside = _shape(config, module)
                part = "self_attn" if module in TARGETS["attention"] else "mlp"
                place = f"base_model.model.model.layers.{layer}.{part}.{module}"
                tensors[f"{place}.lora_A.weight"] = _normal(rng, (rank, inside), inside**-0.5)
                tensors[f"{place}.lora_B.weight"] = _normal(rng, (outside, rank), 0.01)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(file))
        about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": sorted(modules)}))
    return file.stat().st_size


def _normal(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Any:
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def _shape(config: Any, module: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear map."""
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    dim, wide = config.hidden_size, config.intermediate_size
    return {
        "q_proj": (heads, dim),
        "k_proj": (keys, dim),
        "v_proj": (keys, dim),
        "o_proj": (dim, heads),
        "gate_proj": (wide, dim),
        "up_proj": (wide, dim),
        "down_proj": (dim, wide),
    }[module]


if __name__ == "__main__":
    side = Side()
    names = ("open", "write", "start", "stop", "load", "together", "stream", "arrive", "swap", "first_token")
    serve({name: getattr(side, name) for name in names})
