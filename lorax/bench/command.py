"""`lorax bench`: figures of this machine, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from lorax.bench import kernels, methods, multi, nf4, record, serve, train_step
from lorax.bench.kernels import KernelsConfig
from lorax.bench.methods import MethodsConfig
from lorax.bench.multi import Knobs, MultiConfig
from lorax.bench.nf4 import Nf4Config
from lorax.bench.serve import ServeConfig
from lorax.bench.train_step import BenchConfig
from lorax.errors import LoraxError
from lorax.train.record import read_json


@dataclass(frozen=True)
class Args:
    """Measure on this machine, all that is compared taking turns in one run.

    train: the LoRA and QLoRA steps against PEFT, full fine-tuning and their own floor.
    nf4: quantise, dequantise and multiply against bitsandbytes.
    multi: many adapters in one batch, forward and training, against the base alone and PEFT.
    kernels: every operation of lorax_kernels, implementation and shape; what is for other chips, as it was compiled.
    methods: the steps of head, last-2, LoRA and DoRA against full fine-tuning's, and what an analysis takes.
    serve: the server's engine with up to 2,000 adapters, against the base alone, merging, and PEFT.

    Example: lorax bench train --peer-python .venv-peers/bin/python --out bench.json
    """

    what: tyro.conf.Positional[Literal["train", "nf4", "multi", "kernels", "methods", "serve"]]
    """What to measure."""
    config: tyro.conf.OmitArgPrefixes[BenchConfig] = field(default_factory=BenchConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    serve_parts: tuple[Literal["together", "cold", "stream", "arrive"], ...] = serve.PARTS
    """serve: what to measure. A result in --out keeps the parts that this run leaves out."""
    serve_counts: tuple[int, ...] = ServeConfig.counts
    """serve: registered adapters of the streams."""
    serve_requests: int = ServeConfig.requests
    """serve: requests of a stream."""
    multi: tyro.conf.OmitArgPrefixes[Knobs] = field(default_factory=Knobs)
    out: str | None = None
    """Write the result as JSON here."""
    json: bool = False
    """Print the result as JSON."""

    def run(self, words: Sequence[str]) -> None:
        from lorax.cli.output import print_json, print_table

        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "train": lambda: train_step.run(self.config),
            "nf4": lambda: nf4.run(self._nf4()),
            "multi": lambda: multi.run(self._multi()),
            "kernels": lambda: kernels.run(self.kernels),
            "methods": lambda: methods.run(self._methods()),
            "serve": lambda: self._with_older(serve.run(self._serve())),
        }
        result = runs[self.what]()
        if self.out is not None:
            if self.what == "multi" and Path(self.out).exists():
                result = multi.merged(read_json(Path(self.out)), result)
            record.write(self.out, result)
        if self.json:
            print_json(result)
            return
        if self.what == "kernels":
            for title, columns, rows in kernels.tables(result):
                print_table(columns, rows, title)
            return
        times = [(name, f"{t['median']:.3f}", f"{t['least']:.3f}") for name, t in result["seconds"].items()]
        print_table(("", "seconds (median)", "least"), times, f"{result['machine']['processor']}")
        print_table(("figure", "value", "must be", ""), table(result))

    def _nf4(self) -> Nf4Config:
        """The settings that both benchmarks have."""
        c = self.config
        rounds = {} if c.rounds == BenchConfig.rounds else {"rounds": c.rounds}
        return Nf4Config(threads=c.threads, peer_python=c.peer_python, seed=c.seed, **rounds)

    def _methods(self) -> MethodsConfig:
        """Likewise."""
        c, d = self.config, BenchConfig()
        names = ("batch_size", "rank", "rounds", "base", "threads", "seed")
        return MethodsConfig(**{name: getattr(c, name) for name in names if getattr(c, name) != getattr(d, name)})

    def _multi(self) -> MultiConfig:
        """Likewise; batch and length are the benchmark's own unless they are given."""
        c, d = self.config, BenchConfig()
        names = ("batch_size", "seq_len", "rounds", "base", "threads", "peer_python", "seed")
        given = {name: getattr(c, name) for name in names if getattr(c, name) != getattr(d, name)}
        return MultiConfig(**{**vars(self.multi), **given})

    def _serve(self) -> ServeConfig:
        """Likewise: a batch's size is the full batch's, a length that of its answers."""
        c, d = self.config, BenchConfig()
        names = {"batch_size": "batch", "seq_len": "answer"}
        names |= {name: name for name in ("rounds", "base", "threads", "peer_python", "seed")}
        own = {new: getattr(c, old) for old, new in names.items() if getattr(c, old) != getattr(d, old)}
        return ServeConfig(parts=self.serve_parts, counts=self.serve_counts, requests=self.serve_requests, **own)

    def _with_older(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.out is None or set(self.serve_parts) == set(serve.PARTS) or not Path(self.out).is_file():
            return result
        try:
            return serve.merged(json.loads(Path(self.out).read_text(encoding="utf-8")), result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoraxError(f"{self.out}: is no result of bench serve that could be kept ({error})") from None


def table(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the figures: name, value, bound, and whether it holds."""
    rows = []
    for name, figure in result["figures"].items():
        value = "not measured" if figure["value"] is None else f"{figure['value']:.2f}"
        bound = "" if figure["bound"] is None else f"at {figure['bound'][0]} {figure['bound'][1]}"
        met = {True: "yes", False: "NO", None: ""}[figure["met"]]
        rows.append((name.replace("_", " "), value, bound, met))
    return rows
