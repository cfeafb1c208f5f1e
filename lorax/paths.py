"""Names of weights: paths such as `layers/attn/q_proj/kernel`, and patterns over them.

A path joins the keys that lead to a leaf with `/`. The boxes that Flax puts around an array (`nnx.Param`,
`nn.Partitioned`, whose content is the attribute `value`) are not part of the name, so that the same pattern fits
a plain dict, a Linen variable dict and an NNX state.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lorax.errors import LoraxError

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]

_BOX = "value"


def path_of(keys: Sequence[Any]) -> str:
    """The path of one leaf from the key entries that `jax.tree_util` gives.

    Example:
        >>> import jax
        >>> [(keys, _)] = jax.tree_util.tree_flatten_with_path({"mlp": {"kernel": 1.0}})[0]
        >>> path_of(keys)
        'mlp/kernel'
    """
    names = []
    for key in keys:
        if isinstance(key, jax.tree_util.DictKey):
            names.append(str(key.key))
        elif isinstance(key, jax.tree_util.SequenceKey):
            names.append(str(key.idx))
        elif isinstance(key, jax.tree_util.GetAttrKey):
            if key.name != _BOX:
                names.append(key.name)
        else:
            names.append(str(getattr(key, "key", key)))
    return "/".join(names)


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether one pattern fits: a glob whose `*` crosses `/`, a compiled regex (full match), or a callable.

    Example:
        >>> matches("*/q_proj/*", "layers/attn/q_proj/kernel")
        True
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if callable(pattern):
        return bool(pattern(path, leaf))
    raise LoraxError(
        f"pattern {pattern!r} is a {type(pattern).__name__}: pass a glob string, a compiled regex or a callable"
    )


def as_patterns(patterns: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """One pattern or several, as a tuple."""
    if isinstance(patterns, (str, re.Pattern)) or callable(patterns):
        return (patterns,)
    return tuple(patterns)


def show(pattern: Pattern) -> str:
    """A pattern as a person would write it in an error message."""
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


def near_misses(pattern: Pattern, paths: Iterable[str], most: int = 4) -> list[str]:
    """Paths that the author of a pattern that matched nothing may have meant.

    A glob is compared by its literal parts, whole and word by word, so that `*/q_prj/*` and a bare `q_proj` both
    lead to `layers/attn/q_proj/kernel`.
    """
    paths = list(paths)
    if isinstance(pattern, re.Pattern):
        text = re.sub(r"[\\^$.|?*+()\[\]{}]", " ", pattern.pattern)
    elif isinstance(pattern, str):
        text = pattern
    else:
        return paths[:most]
    words = [word for word in re.split(r"[*?/\s\[\]]+", text.lower()) if word]

    def score(path: str) -> float:
        parts = path.lower().split("/")
        best = [max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts) for word in words]
        return sum(best) / len(best) if best else 0.0

    ranked = sorted(paths, key=score, reverse=True)
    return [path for path in ranked if score(path) > 0.5][:most] or paths[:most]
