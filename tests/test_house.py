"""The house rules that a machine can check: documented doors, short files, nothing of anybody's own machine."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import lorax
import lorax.models

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "lorax").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = ("lorax", "kernels", "tests", ".ci")
SUFFIXES = {"", ".py", ".md", ".toml", ".json"}
TEXTS = sorted(
    path
    for path in [*ROOT.glob("*"), *(file for part in PARTS for file in (ROOT / part).rglob("*"))]
    # In a second working tree `.git` is a file, and holds a path.
    if path.is_file() and path.suffix in SUFFIXES and not {"__pycache__", ".git"} & set(path.parts)
)

# A home or a scratch folder of one machine. Written so that this line is none.
OWN_PATHS = re.compile(r"/(?:ro{2}t|ho[m]e/\w+|U[s]ers/\w+|work/(?:m[a]in|sh[a]red))/|/t[m]p/\w+/(?:bin|lib)\b")


PUBLIC = [
    (f"{place.__name__}.{name}", getattr(place, name)) for place in (lorax, lorax.models) for name in place.__all__
]


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_name_says_what_it_is(name, thing):
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    assert len(text.splitlines()[0]) > 15, f"{name}: the first line of its docstring says too little"


@pytest.mark.parametrize("name", [name for name in lorax.__all__ if inspect.isfunction(getattr(lorax, name))])
def test_every_public_function_shows_an_example_and_it_runs(name):
    function = getattr(lorax, name)
    module = importlib.import_module(function.__module__)
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(function, name, globs=dict(vars(module)))
    assert any(test.examples for test in tests), f"lorax.{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_one_idea_and_says_which(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400, f"{path}: more than one idea fits no file"
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path}: begins without saying what it is for"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_for_later_or_swallowed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            assert "NotImplementedError" not in ast.dump(node), f"{path}:{node.lineno}: a stub"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.dump(node.type) if node.type else "everything"
            silent = all(isinstance(step, ast.Pass) for step in node.body)
            assert not (silent and re.search("everything|'Exception'|BaseException|ImportError", caught)), (
                f"{path}:{node.lineno}: an error disappears here"
            )


def test_tests_do_not_skip():
    ways_out = {"skip", "skipif", "xfail", "importorskip"}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ways_out:
                assert "pytest" not in ast.dump(node.value), f"{path}:{node.lineno}: {node.attr}"


def test_no_two_test_files_share_a_name():
    # Pytest imports them by their bare names: a second one stops the whole run before the first test.
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_the_longest_test_files_are_there():
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    (held,) = (
        node.value
        for node in ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LONGEST"
    )
    assert set(ast.literal_eval(held)) <= names


def test_tests_that_read_compiled_programs_compile_them_as_users_do():
    reads = re.compile(r"\.compile\(\)|\.cost_analysis\(|\.memory_analysis\(")
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "aot" not in path.parts and path != Path(__file__) and reads.search(source):
            assert "mark.optimised" in source, f"{path}: see tests/compiling.py"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_knows_anybodys_machine(path):
    found = OWN_PATHS.search(path.read_text(encoding="utf-8"))
    assert found is None, f"{path}: {found and found.group()}"


@pytest.mark.parametrize("line", ["#!/ro" + "ot/.pyenv/bin", "cd /ho" + "me/ann/x", "/t" + "mp/venv/bin/python"])
def test_a_path_of_a_machine_is_seen(line):
    assert OWN_PATHS.search(line)


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert lorax.__version__ == version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version, "the changelog begins with another version"


def test_the_distribution_carries_its_licence_and_types():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert (ROOT / "lorax" / "py.typed").exists()


def test_the_makefile_has_the_commands_that_the_readme_names():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ +)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"quickstart", "test", "test-peers", "test-aot"} <= rules
    assert len(named) >= 2
    assert named <= rules
