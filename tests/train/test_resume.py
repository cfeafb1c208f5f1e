"""A real process, killed and interrupted at bad moments, ends with the bits of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

STEPS = 24


# Run the words that follow with files of at most so many bytes, as on a disk that is full.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Lorax:
    """`lorax train` on the tiny base, in processes of its own."""

    def __init__(self, base, data, cache):
        train, held_out = data
        self.words = [
            sys.executable, "-m", "lorax", "train", "--base", str(base), "--data", str(train),
            "--eval-data", str(held_out), "--steps", str(STEPS), "--batch-size", "4", "--seq-len", "64",
            "--rank", "3", "--lr", "3e-3", "--accumulate", "2", "--warmup", "5", "--schedule", "cosine",
            "--save-every", "2", "--eval-every", "9", "--seed", "5", "--json",
        ]  # fmt: skip
        self.environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            # One device, as a user has it; the test session's own flags stay out of it.
            "XLA_FLAGS": "",
        }

    def start(self, out, *more, largest_file=None):
        # The limit is set by a program in between: a function to run after a fork would fork this process, and JAX
        # warns of that.
        limit = [] if largest_file is None else [sys.executable, "-c", LIMITED, str(largest_file)]
        return subprocess.Popen(
            [*limit, *self.words, "--out", str(out), *more],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out, *more, largest_file=None):
        process = self.start(out, *more, largest_file=largest_file)
        output, errors = process.communicate(timeout=240)
        return process.returncode, output, errors

    def stop_when(self, out, condition, number, *more):
        """Start, and send a signal as soon as `condition(out)` holds."""
        process = self.start(out, *more)
        deadline = time.monotonic() + 240
        while not condition(out):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
        return process.returncode, errors


def rows(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def after_step(number):
    return lambda out: any(row["step"] >= number for row in rows(out))


def while_saving(number):
    """A checkpoint at or after this step is half-written."""

    def condition(out):
        folder = out / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return any(name.endswith(".writing") and int(name.split(".")[0]) >= number for name in names)

    return condition


@pytest.fixture(scope="module")
def lorax(tiny_base, tiny_data, tmp_path_factory):
    return Lorax(tiny_base, tiny_data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(lorax, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output, errors = lorax.finish(out)
    assert code == 0, errors
    assert errors == ""
    return out, json.loads(output)


def assert_same_run(out: Path, undisturbed: Path, report: dict, expected: dict):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()
    ours, theirs = rows(out), rows(undisturbed)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a[k] for k in a if k not in ("seconds", "compiled")} == {
            k: b[k] for k in b if k not in ("seconds", "compiled")
        }
    for a, b in zip(report["eval"]["history"], expected["eval"]["history"], strict=True):
        assert (a["step"], a["loss"], a["accuracy"]) == (b["step"], b["loss"], b["accuracy"])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"{STEPS - 2:08d}", f"{STEPS:08d}"]


def test_a_run_leaves_what_it_promises(undisturbed):
    out, report = undisturbed
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter", "checkpoints", "loss.png", "metrics.jsonl", "report.json", "run.json"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == report
    for when in ("before", "after", "majority"):
        assert {"accuracy", "loss"} <= set(report["eval"][when])
    assert [e["step"] for e in report["eval"]["history"]] == [0, 9, 18, STEPS]
    assert report["train"]["tokens_per_second"] > 0
    assert report["adapter"]["parameters"] == 3 * 3 * sum((16 + 16, 16 + 8, 16 + 8, 16 + 16, 16 + 24, 16 + 24, 24 + 16))
    assert report["adapter"]["optimizer_bytes"] < 2.1 * report["adapter"]["bytes"]
    assert report["train"]["loss"]["last"] < report["train"]["loss"]["first"]
    assert all(receipt["moved"] for receipt in report["coverage"])
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(np.any(value) for value in weights.values())
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["seed"] == 5
    assert record["environment"]["versions"]["jax"]
    assert len(record["sha256"]["data"]) == 64


def test_killed_over_and_over_it_ends_with_the_same_bits(lorax, undisturbed, tmp_path):
    reference, expected = undisturbed
    out = tmp_path / "run"
    resume = ("--resume",)
    # Before the first checkpoint is published, in the middle of saves, in the middle of steps, by Ctrl-C.
    assert lorax.stop_when(out, while_saving(0), signal.SIGKILL, *resume)[0] == -signal.SIGKILL
    assert lorax.stop_when(out, after_step(5), signal.SIGKILL, *resume)[0] == -signal.SIGKILL
    assert lorax.stop_when(out, while_saving(10), signal.SIGKILL, *resume)[0] == -signal.SIGKILL
    code, errors = lorax.stop_when(out, after_step(13), signal.SIGINT, *resume)
    assert code == 130
    assert "Traceback" not in errors
    assert "saving" in errors
    steps = sorted(int(p.name) for p in (out / "checkpoints").iterdir())
    assert steps[-1] == rows(out)[-1]["step"] >= 13
    # The newest checkpoint rots on the disk.
    newest = out / "checkpoints" / f"{steps[-1]:08d}"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: (p.name != "meta.json", p.stat().st_size))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    code, output, errors = lorax.finish(out, *resume)
    assert code == 0, errors
    assert "falling back" in errors
    assert_same_run(out, reference, json.loads(output), expected)
    # Finished: nothing more to do, and the same report.
    code, output, errors = lorax.finish(out, *resume)
    assert code == 0
    assert "finished" in errors
    assert json.loads(output)["eval"]["after"]["loss"] == expected["eval"]["after"]["loss"]


def test_a_full_disk_ends_cleanly_and_resumes(lorax, undisturbed, tmp_path):
    reference, expected = undisturbed
    out = tmp_path / "run"
    assert lorax.stop_when(out, after_step(4), signal.SIGKILL)[0] == -signal.SIGKILL
    before = sorted(p.name for p in (out / "checkpoints").iterdir() if p.name.isdigit())

    code, _, errors = lorax.finish(out, "--resume", largest_file=6000)
    assert code == 2, errors
    assert errors.startswith("lorax: ")
    assert errors.count("\n") == 1
    assert "--resume" in errors
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == before
    code, output, errors = lorax.finish(out, "--resume")
    assert code == 0, errors
    assert_same_run(out, reference, json.loads(output), expected)
