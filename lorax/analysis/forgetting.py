"""What a fine-tune cost elsewhere: the change in loss on general text and on tasks that it was not for.

    forgetting = loss after - loss before          nats per token; above zero, something was lost

Losses are over the counted tokens of held-out examples, the same ones before and after. Source: Biderman et al. 2024,
"LoRA Learns Less and Forgets Less", which measures it by other benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lorax.data.general import general_text
from lorax.errors import LoraxError
from lorax.train.dataset import HeldOut, held_out
from lorax.train.evaluation import evaluate, make_scorer

GENERAL = "general"


class Side(NamedTuple):
    """A model and the parameters that go through it, plain or adapted."""

    model: Any
    params: Any


@dataclass(frozen=True)
class Forgotten:
    """One set: its losses before and after in nats per token, and the accuracies; own: it is what was trained for."""

    name: str
    items: int
    tokens: int
    before: float
    after: float
    accuracy_before: float | None
    accuracy_after: float | None
    own: bool = False

    @property
    def change(self) -> float:
        """Loss after minus before: what was forgotten, in nats per token."""
        return self.after - self.before

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "change": self.change}


def sets(
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    items: int,
    batch_size: int = 16,
    seq_len: int = 512,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, HeldOut]:
    """General text, and the held-out part of each demo task whose data is installed.

    Args:
        tokenizer: the base model's.
        tasks: names of demo tasks.
        items: examples of each set.
        batch_size, seq_len: of the evaluation.
        say: told of the tasks whose data is not there.
    """
    examples = general_text(tokenizer, items, min(seq_len, 256))
    out = {GENERAL: HeldOut(GENERAL, examples, [], batch_size, seq_len)}
    for task in tasks:
        try:
            out[task] = held_out(tokenizer, task=task, path=None, items=items, batch_size=batch_size, seq_len=seq_len)
        except LoraxError as error:
            say(f"not measured on {task}: {error}")
    return out


def forgetting(
    before: Side,
    after: Side,
    over: Mapping[str, HeldOut],
    *,
    own: str | None = None,
    tick: Callable[[int], None] = lambda items: None,
) -> tuple[Forgotten, ...]:
    """The losses of both sides on every set.

    Args:
        before, after: model and parameters.
        over: the sets, from `sets`, or any with `batches()`.
        own: the set that was trained for.
        tick: told of examples as they are done, twice for each.

    Raises:
        LoraxError: a side that is a classifier, which has no loss on text.

    Example:
        over = sets(model.tokenizer, ("medical",), items=50)
        rows = forgetting(Side(model, model.params), Side(model, adapted), over)
        [(row.name, round(row.change, 3)) for row in rows]
    """
    for side in (before, after):
        if side.model.config.labels:
            raise LoraxError("forgetting is the change in loss on text, and a classifier writes none")
    scorers = [make_scorer(side.model) for side in (before, after)]
    out = []
    for name, data in over.items():
        one, two = (
            evaluate(scorer, side.params, data.batches(), tick=tick)
            for scorer, side in zip(scorers, (before, after), strict=True)
        )
        accuracies = (None, None) if name == GENERAL else (one.accuracy, two.accuracy)
        out.append(Forgotten(name, one.items, one.tokens, one.loss, two.loss, *accuracies, own=name == own))
    return tuple(out)
