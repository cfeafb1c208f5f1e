"""Three tasks with answers, made of what installed packages carry, so that nothing has to be downloaded.

    medical   description of a diagnosis -> chapter of ICD-10-CM   (simple-icd-10-cm)
    legal     a passage of a licence -> the family it comes from   (identify)
    code      a docstring -> the function's name                   (Python's standard library)

Each is split into training and held-out items by a hash of the content, never by a random number: the split
is the same for every seed, and what nearly repeats lies on one side.
"""

from __future__ import annotations

from lorax.data.demos import docstrings, legal, medical
from lorax.data.demos.task import DemoTask, Majority, majority
from lorax.errors import LoraxError

TASKS = {"medical": medical.build, "legal": legal.build, "code": docstrings.build}

__all__ = ["TASKS", "DemoTask", "Majority", "demo", "majority"]


def demo(name: str) -> DemoTask:
    """A built-in task.

    Args:
        name: medical, legal or code.

    Raises:
        LoraxError: no such task, or the package that carries its data is not installed.

    Example:
        >>> demo("medical").heldout[0].prompt[-1]["role"]
        'user'
    """
    if name not in TASKS:
        raise LoraxError(f"{name}: no such demo task; there are {', '.join(TASKS)}")
    return TASKS[name]()
