"""Medical: the description of a diagnosis -> the chapter of ICD-10-CM that it is in.

The classification has 97,000 codes, three quarters of them injuries and joints told apart by side and
encounter. Up to four short descriptions of each three-character category are used, so that chapters are
about as frequent as they have categories. A category lies on one side of the split, as siblings have nearly
the same words, and held-out descriptions that nearly repeat one of another category are dropped.

Each chapter is named by one word, and "Codes for special purposes", which has two categories, is left out.
"""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from lorax.data.demos.split import digest, fair_order, held_out, normalise, repeats
from lorax.data.demos.task import DemoTask, ask
from lorax.errors import LoraxError

INSTRUCTION = "Name the ICD-10 chapter."

# Chapter -> answer: one word each, so that the loss is about the choice of a chapter more than about spelling.
CHAPTERS = {
    "1": "infections",  # certain infectious and parasitic diseases
    "2": "neoplasms",  # neoplasms
    "3": "blood",  # blood, blood-forming organs, immune mechanism
    "4": "endocrine",  # endocrine, nutritional and metabolic diseases
    "5": "mental",  # mental, behavioral and neurodevelopmental disorders
    "6": "nervous",  # nervous system
    "7": "eye",  # eye and adnexa
    "8": "ear",  # ear and mastoid process
    "9": "circulatory",  # circulatory system
    "10": "respiratory",  # respiratory system
    "11": "digestive",  # digestive system
    "12": "skin",  # skin and subcutaneous tissue
    "13": "musculoskeletal",  # musculoskeletal system and connective tissue
    "14": "genitourinary",  # genitourinary system
    "15": "pregnancy",  # pregnancy, childbirth and the puerperium
    "16": "perinatal",  # conditions originating in the perinatal period
    "17": "congenital",  # congenital malformations, deformations, chromosomal abnormalities
    "18": "symptoms",  # symptoms, signs and abnormal findings
    "19": "injury",  # injury, poisoning, other consequences of external causes
    "20": "external",  # external causes of morbidity
    "21": "health",  # factors influencing health status, contact with health services
}

_PER_CATEGORY = 4
_LONGEST = 64  # characters; the longest item then takes 45 tokens of SmolLM2, where a row has 48
_HELD_OUT = 0.12


def build() -> DemoTask:
    """The task, read from the package's own data file.

    Raises:
        LoraxError: simple-icd-10-cm is not installed, or its data file is not where or what it was.
    """
    parts: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for category, chapter, descriptions in _categories(_data_file()):
        side = held_out(f"medical {category}", _HELD_OUT)
        parts[side] += [(text, chapter) for text in _chosen(descriptions)]
    train, heldout = _apart(parts[False], parts[True])
    return DemoTask(
        "medical",
        [ask(INSTRUCTION, *item) for item in train],
        [ask(INSTRUCTION, *item) for item in heldout],
        list(CHAPTERS.values()),
        "the description of a diagnosis -> its chapter of ICD-10-CM (from simple-icd-10-cm)",
    )


def _chosen(descriptions: list[str]) -> list[str]:
    """The category's own title and others by hash, none of them long."""
    short = [text for text in descriptions if len(text) <= _LONGEST]
    return sorted(short, key=lambda text: digest("medical", text))[:_PER_CATEGORY]


def _apart(train: list[tuple[str, str]], heldout: list[tuple[str, str]]):
    """Both sides without repeats and without texts that stand for two chapters, the held-out one also without
    what nearly repeats a training text of another category."""
    chapters: dict[str, set[str]] = {}
    for text, chapter in train + heldout:
        chapters.setdefault(normalise(text), set()).add(chapter)
    train, heldout = _distinct(train, chapters), _distinct(heldout, chapters)
    known = repeats([text for text, _ in heldout], [text for text, _ in train])
    heldout = [item for item, again in zip(heldout, known, strict=True) if not again]
    return tuple(fair_order(side, key=lambda item: item[0], label=lambda item: item[1]) for side in (train, heldout))


def _distinct(items: list[tuple[str, str]], chapters: dict[str, set[str]]) -> list[tuple[str, str]]:
    first = {normalise(text): (text, chapter) for text, chapter in reversed(items)}
    return [item for words, item in first.items() if len(chapters[words]) == 1]


def _categories(file: Path) -> list[tuple[str, str, list[str]]]:
    """(category, chapter, descriptions) of every three-character category, in the order of the book."""
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise LoraxError(f"{file}: cannot be read ({error}); reinstall simple-icd-10-cm") from None
    found = []
    for chapter in root.iter("chapter"):
        name = CHAPTERS.get(chapter.findtext("name") or "")
        if name is None:
            continue
        for section in chapter.iter("section"):
            for category in section.findall("diag"):
                texts = [diag.findtext("desc") or "" for diag in category.iter("diag")]
                found.append((category.findtext("name") or "", name, [text for text in texts if text]))
    if {name for _, name, _ in found} != set(CHAPTERS.values()):
        raise LoraxError(f"{file}: has not the 21 chapters that the medical task knows; install simple-icd-10-cm 1.5")
    return found


def _data_file() -> Path:
    """The tabular list, found without importing the package, which would take seconds to index it."""
    spec = importlib.util.find_spec("simple_icd_10_cm")
    if spec is None or not spec.submodule_search_locations:
        raise LoraxError("the medical task needs simple-icd-10-cm: pip install 'lorax-flax[demo]'")
    for folder in spec.submodule_search_locations:
        files = sorted(Path(folder, "data").glob("*.xml"))
        if files:
            return files[-1]
    raise LoraxError("simple-icd-10-cm has no data/*.xml that the medical task could read; install version 1.5")
