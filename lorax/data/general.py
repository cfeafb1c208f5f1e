"""General text to judge forgetting by: the reference of the Python language, as every interpreter carries it.

English prose with some code, which no demo task trains on. It is what a fine-tune should leave alone, not a benchmark:
figures compare a model with itself before.
"""

from __future__ import annotations

import re
from typing import Any

from lorax.data.demos.split import digest
from lorax.data.examples import Example, Examples
from lorax.errors import LoraxError

SHORTEST = 200  # characters of a passage


def passages() -> list[str]:
    """The paragraphs that are long enough, in an order that depends on their content alone.

    Example:
        >>> len(passages()) > 500, min(map(len, passages())) >= SHORTEST
        (True, True)
    """
    from pydoc_data.topics import topics

    found = set()
    for text in topics.values():
        for part in re.split(r"\n\s*\n", text):
            plain = " ".join(part.split())
            if len(plain) >= SHORTEST:
                found.add(plain)
    return sorted(found, key=lambda text: digest("general", text))


def general_text(tokenizer: Any, items: int, seq_len: int) -> Examples:
    """The first `items` passages as tokens; every token but the first counts, those beyond `seq_len` are cut.

    Raises:
        LoraxError: a tokenizer that gives no tokens.
    """
    found = [tuple(tokenizer.encode(text)[: seq_len + 1]) for text in passages()[:items]]
    examples = [Example(ids[:1], ids[1:]) for ids in found if len(ids) > 1]
    if not examples:
        raise LoraxError("the tokenizer gives no tokens for the general text")
    return Examples.of(examples)
