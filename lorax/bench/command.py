"""`lorax bench`: figures of this machine, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from lorax.bench import kernels, methods, multi, nf4, record, train_step
from lorax.bench.kernels import KernelsConfig
from lorax.bench.methods import MethodsConfig
from lorax.bench.multi import MultiConfig
from lorax.bench.nf4 import Nf4Config
from lorax.bench.train_step import BenchConfig


@dataclass(frozen=True)
class Args:
    """Measure on this machine, all that is compared taking turns in one run.

    train: the LoRA and QLoRA steps against PEFT, full fine-tuning and their own floor.
    nf4: quantise, dequantise and multiply against bitsandbytes.
    multi: many adapters in one batch, forward and training, against the base alone and PEFT.
    kernels: every operation of lorax_kernels, implementation and shape; what is for other chips, as it was compiled.
    methods: the steps of head, last-2, LoRA and DoRA against full fine-tuning's, and what an analysis takes.

    Example: lorax bench train --peer-python .venv-peers/bin/python --out bench.json
    """

    what: tyro.conf.Positional[Literal["train", "nf4", "multi", "kernels", "methods"]]
    """What to measure."""
    config: tyro.conf.OmitArgPrefixes[BenchConfig] = field(default_factory=BenchConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    out: str | None = None
    """Write the result as JSON here."""
    json: bool = False
    """Print the result as JSON."""

    def run(self, words: Sequence[str]) -> None:
        from lorax.cli.output import print_json, print_table

        runs = {
            "train": lambda: train_step.run(self.config),
            "nf4": lambda: nf4.run(self._nf4()),
            "multi": lambda: multi.run(self._multi()),
            "kernels": lambda: kernels.run(self.kernels),
            "methods": lambda: methods.run(self._methods()),
        }
        result = runs[self.what]()
        if self.out is not None:
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
        return MultiConfig(**{name: getattr(c, name) for name in names if getattr(c, name) != getattr(d, name)})


def table(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the figures: name, value, bound, and whether it holds."""
    rows = []
    for name, figure in result["figures"].items():
        value = "not measured" if figure["value"] is None else f"{figure['value']:.2f}"
        bound = "" if figure["bound"] is None else f"at {figure['bound'][0]} {figure['bound'][1]}"
        met = {True: "yes", False: "NO", None: ""}[figure["met"]]
        rows.append((name.replace("_", " "), value, bound, met))
    return rows
