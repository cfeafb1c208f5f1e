"""What every command has in common: help, mistakes, exit codes."""

import subprocess
import sys

import pytest

from lorax import cli
from lorax.errors import LoraxError


def run(*words, **kwargs):
    command = [sys.executable, "-m", "lorax", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def assert_one_line(done, *parts):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lorax: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "eval", "generate", "merge", "inspect"))
    assert cli.main([]) == 0


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help_and_json(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["nonsense"], *([name, "--help"] for name in cli.COMMANDS)])
def test_answers_that_need_no_model_load_neither_jax_nor_model_code(words):
    code = (
        "import sys; from lorax.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'matplotlib', 'tokenizers', 'grain', 'lorax.models'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names_are_no_modules():
    """`lorax.adapt` is a function, and stays one after the module of that name has been imported."""
    code = (
        "import lorax, lorax.adapt, lorax.lift.compat, lorax.report, types\n"
        "assert not any(isinstance(getattr(lorax, name), types.ModuleType) for name in lorax.__all__)\n"
        "assert set(lorax.__all__) <= set(dir(lorax)), lorax.__all__\n"
        "assert set(lorax._HOME) | {'LoraxError'} == set(lorax.__all__)\n"
        "assert not hasattr(lorax, 'nonsense')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_one_line():
    assert_one_line(run("fly"), "no command 'fly'", "train")


def test_an_unknown_option_is_exit_2_without_traceback():
    done = run("train", "--task", "medical", "--lerning-rate", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "lerning-rate" in done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train"], ["--task", "--data"]),
        (["train", "--task", "medical", "--data", "x.jsonl"], ["--task", "--data"]),
        (["train", "--data", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        (["train", "--task", "medical", "--rank", "0"], ["rank is 0", "at least 1"]),
        (["train", "--task", "medical", "--rank", "-3"], ["rank is -3"]),
        (["train", "--task", "medical", "--lr", "nan"], ["lr is nan"]),
        (["train", "--task", "medical", "--steps", "0"], ["steps is 0"]),
        (["train", "--task", "medical", "--seed", "9" * 20], ["seed is 9999", "at most 2147483647"]),
        (["train", "--task", "medical", "--out", ""], ["--out", "empty"]),
        (["train", "--task", "medical", "--resume"], ["--out"]),
        (["train", "--resume", "--out", "nowhere"], ["nowhere", "no run to resume"]),
        (["generate", "--prompt", "x", "--seed", "-1"], ["--seed -1"]),
        (["generate", "--prompt", "x", "--seed", "9" * 20], ["--seed 9999", "below 2^32"]),
        (["generate", "--prompt", "x", "--base", ""], ["empty name", "no such base"]),
        (["eval", "--task", "medical", "--items", "0"], ["--items 0", "at least 1"]),
        (["eval", "--task", "medical", "--adapter", ""], ["no such folder"]),
        (["inspect", ""], ["path is empty"]),
        (["generate", "--prompt", "x", "--top-p", "0"], ["--top-p"]),
        (["generate", "--prompt", "x", "--max-tokens", "0"], ["--max-tokens"]),
        (["generate", "--prompt", "x", "--adapter", "nowhere"], ["nowhere", "no such folder"]),
        (["merge", "--adapter", "nowhere", "--out", "merged"], ["nowhere"]),
        (["merge", "--adapter", "nowhere", "--out", "."], ["exists already"]),
        (["eval", "--adapter", "nowhere", "--task", "medical"], ["nowhere"]),
        (["inspect", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(words, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorax: ")
    assert all(part in line for part in parts)
    assert list(tmp_path.iterdir()) == []


def test_the_message_of_an_error_is_folded_into_one_line(monkeypatch, capsys):
    def broken(words):
        raise LoraxError("first\nsecond")

    monkeypatch.setattr(cli, "_dispatch", broken)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "lorax: first second\n"


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 1 TiB"), "RESOURCE_EXHAUSTED: Out of memory"])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    class JaxRuntimeError(RuntimeError):
        pass

    def hungry(words):
        raise error if isinstance(error, Exception) else JaxRuntimeError(error)

    monkeypatch.setattr(cli, "_dispatch", hungry)
    assert cli.main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "too little memory" in line


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(words):
        raise RuntimeError("a fault of lorax")

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["train"])


def test_ctrl_c_is_130(monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["train"]) == 130


def test_a_closed_pipe_is_quiet():
    # `true` closes its end without reading; help is longer than nothing.
    done = subprocess.run(
        f"{sys.executable} -c 'import time; time.sleep(1); from lorax.cli import main; main([\"--help\"])' | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
