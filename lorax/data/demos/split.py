"""Splitting by content: hashes instead of random numbers, and near-repeats kept together."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_WORD = re.compile(r"[a-z]+")


def digest(*parts: str) -> int:
    """64 bits of a hash of texts: the same on every machine, in every process."""
    data = "\x00".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def held_out(key: str, fraction: float) -> bool:
    """Whether what has this content key is held out; about `fraction` of all keys are."""
    return digest("split", key) < fraction * 2**64


def normalise(text: str) -> str:
    """A text as its lower-case words alone: two that differ in case, digits or punctuation are equal."""
    return " ".join(_WORD.findall(text.casefold()))


def fair_order(items: Iterable[Item], key: Callable[[Item], str], label: Callable[[Item], str]) -> list[Item]:
    """Order by hash such that every first n items have labels in nearly the proportions of all.

    The k-th of a label's m items, by hash, goes to the place (k + u) / m of the way, u in [0, 1) from its hash.
    """
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[label(item)].append(item)
    placed = []
    for members in groups.values():
        members.sort(key=lambda item: digest("order", key(item)))
        for k, item in enumerate(members):
            jitter = digest("place", key(item)) / 2**64
            placed.append(((k + jitter) / len(members), key(item), item))
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def clusters(
    texts: Sequence[str], *, size: int = 4, overlap: float = 0.4, together: Sequence[Hashable] | None = None
) -> list[str]:
    """Group texts that share much of their wording, directly or through others.

    Two texts belong together when runs of `size` words that are in both make up at least `overlap` of those
    of the shorter one. Whoever splits by group never has such a pair on two sides.

    Args:
        texts: any texts.
        size: words in a run; a shorter text is one run.
        overlap: part of the shorter text's runs, 0..1.
        together: for each text, what it must not be separated from: equal values share a group.

    Returns:
        For each text the key of its group: the first of its members' normalised texts in alphabetical order,
        so that it does not hang on the order of the texts.

    Example:
        >>> clusters(["Red cars go fast today", "red cars go fast", "A blue whale"])
        ['red cars go fast', 'red cars go fast', 'a blue whale']
    """
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for a, b in _alike([_runs(text, size) for text in texts], overlap):
        root[find(a)] = find(b)
    first: dict[Hashable, int] = {}
    for i, what in enumerate(together or ()):
        root[find(i)] = find(first.setdefault(what, i))
    keys: dict[int, str] = {}
    for i, text in enumerate(texts):
        words = normalise(text)
        keys[find(i)] = min(keys.get(find(i), words), words)
    return [keys[find(i)] for i in range(len(texts))]


def repeats(texts: Sequence[str], others: Sequence[str], *, size: int = 4, overlap: float = 0.5) -> list[bool]:
    """For each of `texts`, whether it nearly repeats one of `others`, in the sense of `clusters`.

    Example:
        >>> repeats(["Red cars go fast today", "A blue whale"], ["red cars go fast"])
        [True, False]
    """
    runs = [_runs(text, size) for text in (*texts, *others)]
    found = [False] * len(texts)
    for a, b in _alike(runs, overlap):
        if a < len(texts) <= b:
            found[a] = True
    return found


def _alike(runs: Sequence[set[tuple[str, ...]]], overlap: float) -> Iterator[tuple[int, int]]:
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(runs):
        for run in own:
            holders[run].append(i)
    shared: Counter[tuple[int, int]] = Counter()
    for members in holders.values():
        shared.update((a, b) for k, a in enumerate(members) for b in members[k + 1 :])
    return ((a, b) for (a, b), count in shared.items() if count >= overlap * min(len(runs[a]), len(runs[b])))


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    if len(words) < size:
        return {tuple(words)}
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
