"""Code: what a function's docstring says -> the function's name.

The docstrings are those of the standard library's public functions and methods, read from its source files,
nothing is imported. One that says its function's name (in whatever case, with or without its underscores) is
left out, for the answer could be copied. Docstrings that nearly repeat, as those of methods that override
each other do, lie on one side of the split, and equal ones are kept once. The library differs between
versions of Python, and so does the task; within a version it is always the same.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lorax.data.demos.split import clusters, fair_order, held_out, normalise
from lorax.data.demos.task import DemoTask, ask
from lorax.data.examples import Record
from lorax.errors import LoraxError

INSTRUCTION = "Name the Python function."

# Folders that are not the library itself, and parts that some builds of Python come without.
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
    "ensurepip", "pydoc_data", "encodings", "distutils", "tkinter", "sqlite3", "curses", "dbm",
    "turtle.py",
}  # fmt: skip
_PRIVATE = re.compile("_(?!_init__)")
_SHORTEST, _LONGEST = 4, 25  # words
_HELD_OUT = 0.2


def build() -> DemoTask:
    """The task.

    Raises:
        LoraxError: this Python comes without the sources of its standard library.
    """
    pairs = list(_usable())
    if len(pairs) < 1000:
        raise LoraxError(
            f"the code task reads the standard library's sources, and {_library()} has {len(pairs)} docstrings that "
            f"it can use; run a Python that is installed with its .py files"
        )
    groups = clusters([text for text, _ in pairs], overlap=0.5)
    parts: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for pair, group in zip(pairs, groups, strict=True):
        parts[held_out(f"code {group}", _HELD_OUT)].append(pair)
    return DemoTask(
        "code",
        _records(parts[False]),
        _records(parts[True]),
        None,
        "a docstring of the standard library -> the function's name",
    )


def _records(pairs: list[tuple[str, str]]) -> list[Record]:
    # Names are many and mostly single, so there is nothing to keep in proportion: plain hash order.
    ordered = fair_order(pairs, key=lambda pair: pair[0], label=lambda pair: "")
    return [ask(INSTRUCTION, text, name) for text, name in ordered]


def _usable() -> Iterator[tuple[str, str]]:
    """(docstring, name), each docstring once; those that stand for several names are left out."""
    names: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for name, text in _documented(_library()):
        if _SHORTEST <= len(text.split()) <= _LONGEST and not says(text, name):
            words = normalise(text)
            names[words].add(name)
            first.setdefault(words, text)
    return ((text, next(iter(names[words]))) for words, text in first.items() if len(names[words]) == 1)


def says(text: str, name: str) -> bool:
    """Whether a text has a function's name in it, however written.

    Example:
        >>> says("Like writeLines, but faster.", "write_lines"), says("Write a list of lines.", "write_lines")
        (True, False)
    """
    parts = [re.escape(part) for part in name.split("_") if part]
    spelled = r"(?<![A-Za-z0-9])" + r"[\s_.-]?".join(parts) + r"(?![A-Za-z0-9])"
    return re.search(spelled, text, re.IGNORECASE) is not None


@lru_cache(maxsize=1)
def _documented(library: Path) -> tuple[tuple[str, str], ...]:
    """(name, first paragraph of the docstring) of every public function, in the order of the files."""
    found = []
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if _SKIPPED.isdisjoint(parts) and not any(map(_PRIVATE.match, parts)):
            found += _in_file(file)
    return tuple(found)


def _in_file(file: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise LoraxError(f"{file}: the code task cannot read it ({error}); is this Python installed whole?") from None
    for node in _functions(tree):
        if not node.name.startswith("_"):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if text:
                yield node.name, text


def _functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and methods of its classes; not those inside functions, which nobody can call."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _functions(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
