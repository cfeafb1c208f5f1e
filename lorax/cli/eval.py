"""`lorax eval`: how good is it on held-out examples?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorax.cli.output import figures, measures, print_json, print_table
from lorax.cli.source import Source, find, open_model, settings_of
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Exact match under greedy decoding and loss per completion token, on held-out examples.

    With --forgetting: loss on general text and on all demo tasks, before and after, written into the run's folder.

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
    forgetting: bool = False
    """What the run cost elsewhere: the change in loss against its base."""
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
        if self.forgetting:
            return self._forgetting(source)
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

    def _forgetting(self, source: Source) -> None:
        """Both sides on every set, as a table, and as files where the run has a folder."""
        if self.task is not None or self.data is not None or self.adapter is None:
            raise LoraxError("--forgetting: compares a run with its base on sets of its own; give --adapter alone")
        if self.items < 1:
            raise LoraxError(f"--items {self.items}: must be at least 1")
        run = _run_of(self.adapter)
        settings = {} if run is None else settings_of(run / "run.json")
        base = source.base if source.adapter is not None else settings.get("base")
        if base is None:
            raise LoraxError(
                f"{self.adapter}: does not say which base it was trained from; compare runs of lorax train"
            )
        from lorax.analysis.forgetting import Side, forgetting, sets
        from lorax.data.demos import TASKS
        from lorax.io.atomic import write_json
        from lorax.train.progress import Display
        from lorax.train.runtime import keep_compiled_programs

        keep_compiled_programs()
        after = Side(*open_model(source))
        before = _before(source, after, base)
        with Display(quiet=self.json) as show:
            sizes = {"items": self.items, "batch_size": self.batch_size, "seq_len": self.seq_len}
            over = sets(after.model.tokenizer, TASKS, **sizes, say=show.say)
            show.begin("forgetting", 2 * sum(map(len, over.values())))
            rows = forgetting(before, after, over, own=settings.get("task"), tick=show.advance)
        report = {"base": base, "adapter": self.adapter, "sets": [row.as_dict() for row in rows]}
        if run is not None:
            from lorax.analysis.pictures import save_forgetting

            write_json(run / "forgetting.json", report)
            save_forgetting(run / "forgetting.png", rows, run.name)
        if self.json:
            print_json(report)
            return
        lines = [
            (
                row.name + (" (trained for)" if row.own else ""),
                f"{row.before:.3f}",
                f"{row.after:.3f}",
                f"{row.change:+.3f}",
            )
            for row in rows
        ]
        print_table(("loss on", "before", "after", "change"), lines, f"{self.adapter} against {base}")
        if run is not None:
            print(f"saved in {run}: forgetting.json, forgetting.png")


def _run_of(adapter: str) -> Path | None:
    """The folder of the run that an adapter or a model belongs to."""
    folder = Path(adapter)
    return next((place for place in (folder, folder.parent) if (place / "run.json").is_file()), None)


def _before(source: Source, after: Any, base: str) -> Any:
    """The other side: what the adapter lies over, loaded already, or the base of a run that trained whole weights."""
    from lorax.analysis.forgetting import Side

    if source.adapter is not None:
        return Side(after.model, after.model.params)
    return Side(*open_model(Source(base, None)))
