"""`lorax eval`: how good is it on held-out examples?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lorax.cli.output import figures, measures, print_json, print_table
from lorax.cli.source import find, open_model
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Exact match under greedy decoding and loss per completion token, on held-out examples.

    Example: lorax eval --adapter runs/medical-lora --task medical
    """

    base: str | None = None
    """The base model; by default the one that the adapter was trained on."""
    adapter: str | None = None
    """A run's folder or an adapter's; the base alone without it."""
    task: Literal["medical", "legal", "code"] | None = None
    """The held-out part of a built-in demo task."""
    data: str | None = None
    """JSONL of your own; every example is evaluated."""
    items: int = 300
    """Examples to evaluate, at most."""
    batch_size: int = 16
    """Rows in a batch."""
    seq_len: int = 512
    """Longest row in tokens."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        source = find(self.base, self.adapter)
        if (self.task is None) == (self.data is None):
            raise LoraxError("give either --task or --data: a built-in task, or a JSONL file of your own")
        if self.items < 1:
            raise LoraxError(f"--items {self.items}: must be at least 1")
        from lorax.train.dataset import held_out
        from lorax.train.evaluation import evaluate, make_scorer
        from lorax.train.progress import Display
        from lorax.train.regression import make_number_scorer
        from lorax.train.runtime import keep_compiled_programs

        keep_compiled_programs()
        model, params = open_model(source)
        data = held_out(
            model.tokenizer,
            task=self.task,
            path=self.data,
            items=self.items,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            labels=model.config.labels,
            regression=model.config.regression,
        )
        with Display(quiet=self.json) as show:
            show.begin("eval", len(data))
            scorer = make_number_scorer(model) if model.config.regression else make_scorer(model)
            found = evaluate(scorer, params, data.batches(), tick=show.advance)
        report = {
            "base": source.base,
            "adapter": str(source.adapter) if source.adapter else None,
            "data": data.name,
            **found._asdict(),
        }
        if self.json:
            print_json(report)
        else:
            label = str(source.adapter or source.base)
            print_table(
                measures(bool(model.config.labels), model.config.regression),
                [(label, *figures(report))],
                f"{data.name}: {found.items} examples",
            )
