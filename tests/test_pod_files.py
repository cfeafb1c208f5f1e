"""What a team launches on a pod: every `lorax` command in experiments/pod is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro

from lorax.cli.plan import Args as Plan
from lorax.cli.train import Args as Train

POD = Path(__file__).parents[1] / "experiments" / "pod"


def commands():
    """(place, words after `lorax`) of the notes, of the JobSet, and of the Ray script."""
    notes = (POD / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for found in re.findall(r"lorax (train [^\"`\n]*?)(?:\"|`|\n| & done)", notes):
        if "$i" in found or "--task" in found or "--data" in found:
            yield "README.md", shlex.split(found.replace("$i", "0"))
    manifest = (POD / "jobset.yaml").read_text(encoding="utf-8")
    listed = re.search(r"command:\n((?: +- .*\n)+)", manifest)
    assert listed is not None
    first, *words = [line.strip()[2:].strip('"') for line in listed[1].splitlines()]
    assert first == "lorax"
    yield "jobset.yaml", words
    said = re.search(r"-- \\\n +(.*)\n", (POD / "ray_train.py").read_text(encoding="utf-8"))
    assert said is not None
    yield "ray_train.py", ["train", *said[1].split()]


FOUND = list(commands())


def test_there_are_commands_of_each_kind():
    assert {place for place, _ in FOUND} == {"README.md", "jobset.yaml", "ray_train.py"}
    assert len(FOUND) >= 6


@pytest.mark.parametrize(("place", "words"), FOUND, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:40])
def test_a_command_is_taken(place, words, monkeypatch):
    # A file of data is there on the pod, not here.
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    args = tyro.cli(Train, args=words[1:])
    args.config.check()
    assert args.out
    assert args.config.batch_size % 16 == 0
    if place == "ray_train.py":
        return
    assert args.distributed or args.processes == 2
    assert args.resume or args.processes == 2


def test_a_job_set_and_its_mesh_have_the_chips_of_the_slice():
    manifest = (POD / "jobset.yaml").read_text(encoding="utf-8")
    number = lambda key: int(re.search(rf"{key}: (\d+)", manifest)[1])  # noqa: E731
    rows, columns = map(int, re.search(r"tpu-topology: (\d+)x(\d+)", manifest).groups())
    assert number("parallelism") == number("completions")
    assert number("parallelism") * number("google.com/tpu") == rows * columns
    (words,) = [words for place, words in FOUND if place == "jobset.yaml"]
    assert f"data={rows * columns}" in words


def test_the_plan_that_the_notes_name_exists():
    (said,) = re.findall(r"lorax plan ([^`]*?) \.\.\.", (POD / "README.md").read_text(encoding="utf-8"))
    assert tyro.cli(Plan, args=shlex.split(said)).compile
