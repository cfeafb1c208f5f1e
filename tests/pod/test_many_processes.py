"""`lorax train` in two and in four processes over gloo: the weights of one, and the same bits after SIGKILL."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_run import same_weights, write_examples, write_tiny_base

pytestmark = pytest.mark.pod

STEPS = 8


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Pod:
    """`lorax train` in processes of its own, all on one folder."""

    def __init__(self, folder):
        base = write_tiny_base(folder / "base")
        train, held_out = write_examples(folder / "train.jsonl", 41), write_examples(folder / "held.jsonl", 13, seed=1)
        self.words = [
            sys.executable, "-m", "lorax", "train", "--base", str(base), "--data", str(train), "--eval-data",
            str(held_out), "--steps", str(STEPS), "--batch-size", "8", "--seq-len", "64", "--rank", "4", "--lr", "3e-3",
            "--accumulate", "2", "--save-every", "2", "--seed", "5", "--json",
        ]  # fmt: skip
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    def start(self, out, processes, mesh, devices, *more):
        port = free_port()
        words = [*self.words, "--out", str(out), "--mesh", mesh, *more]
        env = {**self.environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if processes == 1:
            return [self._process(words, env)]
        joining = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process-id"]
        return [self._process([*words, *joining, str(i)], env) for i in range(processes)]

    def _process(self, words, env):
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, out, processes, mesh, devices, *more):
        """The report, which process 0 alone prints."""
        running = self.start(out, processes, mesh, devices, *more)
        said = [process.communicate(timeout=400) for process in running]
        assert [process.returncode for process in running] == [0] * processes, said
        assert all(output == "" for output, _ in said[1:])
        return json.loads(said[0][0])

    def kill_one(self, out, victim, processes, mesh, devices):
        """Start, kill one process without a word once a step after a checkpoint is done, and wait for the others."""
        running = self.start(out, processes, mesh, devices)
        deadline = time.monotonic() + 400
        while not any(row["step"] >= 5 for row in rows(out)):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in running), [p.communicate() for p in running]
            time.sleep(0.002)
        running[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for process in running:
            process.communicate(timeout=400)
        assert time.monotonic() - killed < 90, "the others noticed late"
        assert all(process.returncode != 0 for process in running)
        assert not (out / "report.json").exists()


def rows(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same_bits(one, other):
    assert (one / "adapter" / "adapter_model.safetensors").read_bytes() == (
        other / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    keep = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "compiled")}  # noqa: E731
    assert list(map(keep, rows(one))) == list(map(keep, rows(other)))


def close(one, other):
    same_weights(weights(one), weights(other))


@pytest.fixture(scope="module")
def pod(tmp_path_factory):
    return Pod(tmp_path_factory.mktemp("pod"))


@pytest.fixture(scope="module")
def alone(pod, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "alone"
    return out, pod.finish(out, 1, "data=1", 1)


# Processes, mesh, devices of each: batch and arithmetic split inside a process and across them.
CASES = {"two": (2, "data=2,model=2", 2), "four": (4, "data=4", 1)}


@pytest.fixture(scope="module", params=CASES)
def undisturbed(request, pod, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    return request.param, out, pod.finish(out, *CASES[request.param])


def test_many_processes_give_what_one_gives(undisturbed, alone):
    name, out, report = undisturbed
    reference, expected = alone
    close(out, reference)
    assert report["eval"]["after"]["loss"] == pytest.approx(expected["eval"]["after"]["loss"], rel=1e-5)
    assert report["eval"]["before"]["accuracy"] == expected["eval"]["before"]["accuracy"]
    assert [row["tokens"] for row in rows(out)] == [row["tokens"] for row in rows(reference)]
    saved = {path.name for path in (out / "checkpoints" / f"{STEPS:08d}" / "state").iterdir()}
    assert {f"ocdbt.process_{i}" for i in range(CASES[name][0])} <= saved, "each process writes its own part"


def test_one_is_killed_and_all_resume_to_the_same_bits(undisturbed, pod, tmp_path):
    name, reference, _ = undisturbed
    out = tmp_path / "run"
    pod.kill_one(out, CASES[name][0] - 1, *CASES[name])
    pod.finish(out, *CASES[name], "--resume")
    same_bits(out, reference)


def test_a_checkpoint_goes_on_over_another_mesh(pod, alone, tmp_path):
    """Two processes begin, process 0 dies; four go on, then one alone."""
    out = tmp_path / "run"
    pod.kill_one(out, 0, *CASES["two"])
    pod.finish(out, 4, "data=2,model=2", 1, "--resume")
    close(out, alone[0])


def test_mistakes_are_one_line(pod, tmp_path):
    words = [*pod.words, "--out", str(tmp_path / "run")]
    for more, part in (
        (["--processes", "2", "--process-id", "0"], "give the coordinator"),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"], "numbered from 0 to 1"),
        (["--mesh", "data=3"], "this machine has"),
    ):
        done = subprocess.run([*words, *more], env=pod.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("lorax: ")
        assert part in line
