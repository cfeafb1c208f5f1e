"""experiments/pod/ray_train.py on local Ray workers: two processes of one run, and the weights of `lorax train`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_run import same_weights, write_examples, write_tiny_base

pytestmark = pytest.mark.pod

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "pod" / "ray_train.py"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    base, data = write_tiny_base(folder / "base"), write_examples(folder / "train.jsonl", 41)
    held_out = write_examples(folder / "held.jsonl", 13, seed=1)
    return [
        "--base", str(base), "--data", str(data), "--eval-data", str(held_out), "--steps", "4", "--batch-size", "8",
        "--seq-len", "64", "--rank", "4", "--lr", "3e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def environment():
    # Ray's workers import lorax from where the driver does.
    places = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, places))}


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_two_ray_workers_are_one_run(words, environment, tmp_path):
    out, alone = tmp_path / "ray-run", tmp_path / "alone"
    command = [sys.executable, str(SCRIPT), "--workers", "2", "--chips", "0", "--storage", str(tmp_path / "ray")]
    done = subprocess.run(
        [*command, "--", *words, "--mesh", "data=2", "--out", str(out)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray passes on what workers print, whenever it comes.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    said = json.loads(line)
    assert (said["processes"], said["devices"]) == (2, 2)
    report = json.loads((out / "report.json").read_text())
    assert said["loss"] == report["eval"]["after"]["loss"]
    plain = [sys.executable, "-m", "lorax", "train", *words, "--json", "--out", str(alone)]
    done = subprocess.run(plain, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    same_weights(adapter(out), adapter(alone))


def test_a_slice_asks_ray_for_its_chips():
    spec = importlib.util.spec_from_file_location("ray_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.trainer(["--task", "medical"], 4, 4, "TPU-V5LITEPOD", "4x4", "runs/ray")
    assert made.scaling_config.use_tpu
    assert made.scaling_config.resources_per_worker == {"TPU": 4}
    assert made.scaling_config.num_workers == 4
    assert made.run_config.failure_config.max_failures == 10
