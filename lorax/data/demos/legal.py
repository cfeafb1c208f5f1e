"""Legal: a passage of a software licence -> the family of licences that it comes from.

Licences are cut into passages of at most 30 words. Many of their words are common property, so a passage that
nearly repeats in another family is left out, nearly equal passages of one family lie on one side of the
split, and so do all passages of a paragraph. Versions and relatives of a licence share most of their text,
which is why the answer is the family and not the identifier.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from lorax.data.demos.split import clusters, fair_order, held_out, normalise
from lorax.data.demos.task import DemoTask, ask
from lorax.data.examples import Record
from lorax.errors import LoraxError

INSTRUCTION = "Name the licence family."

FAMILIES = {
    "GNU": ("GPL-2.0", "GPL-3.0", "AGPL-3.0", "LGPL-2.1", "LGPL-3.0"),
    "Creative Commons": ("CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0"),
    "European Union": ("EUPL-1.1", "EUPL-1.2"),
    "LaTeX": ("LPPL-1.3c",),
    "Eclipse": ("EPL-1.0", "EPL-2.0"),
    "Mozilla": ("MPL-2.0",),
    "Apache": ("Apache-2.0", "ECL-2.0"),
    "Academic": ("AFL-3.0", "OSL-3.0"),
    "Artistic": ("Artistic-2.0",),
    "Open Font": ("OFL-1.1",),
    "Microsoft": ("MS-PL", "MS-RL"),
    "permissive": (
        "0BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSD-3-Clause-Clear",
        "BSL-1.0",
        "ISC",
        "MIT",
        "NCSA",
        "PostgreSQL",
        "UPL-1.0",
        "Unlicense",
        "WTFPL",
        "Zlib",
    ),
}

_SHORTEST, _LONGEST = 8, 30  # words
_HELD_OUT = 0.3


class Passage(NamedTuple):
    text: str
    family: str
    paragraph: int


def build() -> DemoTask:
    """The task.

    Raises:
        LoraxError: identify is not installed, or carries no licence texts.
    """
    passages = list(_passages())
    keys = clusters([p.text for p in passages])
    families = defaultdict(set)
    for passage, key in zip(passages, keys, strict=True):
        families[key].add(passage.family)
    groups = clusters([p.text for p in passages], together=[p.paragraph for p in passages])
    parts: dict[bool, list[Passage]] = {False: [], True: []}
    seen: set[str] = set()
    for passage, key, group in zip(passages, keys, groups, strict=True):
        words = normalise(passage.text)
        if len(families[key]) == 1 and words not in seen:
            seen.add(words)
            parts[held_out(f"legal {group}", _HELD_OUT)].append(passage)
    return DemoTask(
        "legal",
        _records(parts[False]),
        _records(parts[True]),
        list(FAMILIES),
        "a passage of a licence -> the family of licences that it comes from (from identify)",
    )


def _records(passages: list[Passage]) -> list[Record]:
    ordered = fair_order(passages, key=lambda p: p.text, label=lambda p: p.family)
    return [ask(INSTRUCTION, p.text, p.family) for p in ordered]


def _passages() -> Iterator[Passage]:
    family = {name: label for label, names in FAMILIES.items() for name in names}
    paragraph = 0
    for name, text in _licences():
        if name not in family:  # a newer identify may know more licences
            continue
        for part in re.split(r"\n\s*\n", text):
            paragraph += 1
            yield from (Passage(words, family[name], paragraph) for words in cut(part))


def cut(paragraph: str) -> list[str]:
    """A paragraph in passages of 8 to 30 words, whole sentences as far as possible; shorter rests are dropped."""
    passages: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.;:])\s+", paragraph.strip()):
        words = sentence.split()
        if passages[-1] and len(passages[-1]) + len(words) > _LONGEST:
            passages.append([])
        passages[-1] += words
        while len(passages[-1]) > _LONGEST:
            passages[-1:] = [passages[-1][:_LONGEST], passages[-1][_LONGEST:]]
    return [" ".join(words) for words in passages if len(words) >= _SHORTEST]


def _licences() -> tuple[tuple[str, str], ...]:
    if importlib.util.find_spec("identify") is None:
        raise LoraxError("the legal task needs identify: pip install 'lorax-flax[demo]'")
    if importlib.util.find_spec("identify.vendor.licenses") is None:
        raise LoraxError("this identify carries no licence texts; install identify 2.6")
    from identify.vendor.licenses import LICENSES

    return LICENSES
