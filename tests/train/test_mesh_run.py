"""A run over a mesh of this process's devices: the weights of one device, a checkpoint that any mesh goes on from."""

import jax
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file
from tiny_run import same_weights

from lorax import LoraxError
from lorax.train.config import TrainConfig
from lorax.train.runner import run


def make_mesh(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.fixture
def config(tiny_base, tiny_data):
    train, held_out = map(str, tiny_data)
    shape = {"batch_size": 4, "seq_len": 32, "rank": 2, "lr": 3e-3, "eval_items": 4, "save_every": 1}
    return TrainConfig(base=str(tiny_base), data=train, eval_data=held_out, steps=2, variant="dora", **shape)


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_mesh_gives_what_one_device_gives_and_hands_over_its_checkpoint(config, tmp_path):
    run(config, tmp_path / "one")
    report = run(config, tmp_path / "mesh", mesh=make_mesh(data=2, model=2))
    assert report["train"]["steps"] == 2
    # The same run as if it had been stopped after its first step, over yet another mesh.
    later = tmp_path / "mesh" / "checkpoints" / "00000002"
    for path in sorted(later.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    later.rmdir()
    want = weights(tmp_path / "one")
    same_weights(weights(tmp_path / "mesh"), want)
    (tmp_path / "mesh" / "report.json").unlink()
    run(config, tmp_path / "mesh", resume=True, mesh=make_mesh(data=4))
    same_weights(weights(tmp_path / "mesh"), want)


def test_what_a_mesh_cannot_do_is_said_before_anything_is_loaded(config, tmp_path):
    from dataclasses import replace

    with pytest.raises(LoraxError, match="--batch-size 4: does not divide over the 8 parts"):
        run(config, tmp_path / "run", mesh=make_mesh(data=8))
    with pytest.raises(LoraxError, match="--paged"):
        run(replace(config, paged=True), tmp_path / "run", mesh=make_mesh(data=2))
    assert not (tmp_path / "run").exists()
