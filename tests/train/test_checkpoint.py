"""Checkpoints under bad luck: flipped bits, missing files, full disks, half-written folders."""

import errno
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax.errors import LoraxError
from lorax.train import checkpoint
from lorax.train.checkpoint import Checkpoints, flat
from lorax.train.step import State, init_state


def state_at(step: int) -> State:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = {
        "layers": {"w": jax.random.normal(jax.random.key(step), (3, 5, 7)), "frozen": None},
        "b": jnp.ones(1),
    }
    return init_state(params, tx, seed=step)._replace(step=jnp.int32(step))


def assert_same(a: State, b: State) -> None:
    for (name, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)
        assert x.dtype == y.dtype


@pytest.fixture
def store(tmp_path):
    messages = []
    made = Checkpoints(tmp_path / "checkpoints", say=messages.append)
    made.messages = messages
    return made


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file() and p.name != "meta.json"),
        key=lambda p: p.stat().st_size,
    )


def test_round_trip_is_exact_and_keeps_two(store):
    for step in (1, 2, 10):
        store.save(state_at(step), {"data": {"position": step}, "evals": []})
    assert store.steps() == [2, 10]
    found = store.restore(state_at(0))
    assert_same(found.state, state_at(10))
    assert found.meta == {"data": {"position": 10}, "evals": []}
    assert store.messages == []


def test_nothing_there_is_none(store):
    assert store.restore(state_at(0)) is None


def test_saving_a_step_again_changes_nothing(store):
    first = store.save(state_at(1), {"n": 1})
    before = largest_file(first).stat().st_mtime_ns
    store.save(state_at(1), {"n": 2})
    assert largest_file(first).stat().st_mtime_ns == before


def damage_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def damage_missing(folder):
    largest_file(folder).unlink()


def damage_meta(folder):
    (folder / "meta.json").write_text('{"step": 2, "sha')


def damage_number_in_meta(folder):
    path = folder / "meta.json"
    text = path.read_text()
    assert '"n": 2' in text
    path.write_text(text.replace('"n": 2', '"n": 3'))


def damage_no_meta(folder):
    (folder / "meta.json").unlink()


@pytest.mark.parametrize(
    "damage", [damage_bit, damage_cut, damage_missing, damage_meta, damage_number_in_meta, damage_no_meta]
)
def test_a_damaged_checkpoint_falls_back_and_says_so(store, damage):
    store.save(state_at(1), {"n": 1})
    damage(store.save(state_at(2), {"n": 2}))
    found = store.restore(state_at(0))
    assert_same(found.state, state_at(1))
    (message,) = store.messages
    assert "00000002" in message
    assert "falling back" in message
    store.drop_after(1)
    store.save(state_at(2), {"n": 2})
    assert_same(store.restore(state_at(0)).state, state_at(2))


def test_all_damaged_is_an_error(store):
    damage_bit(store.save(state_at(1), {}))
    with pytest.raises(LoraxError, match="every checkpoint is damaged"):
        store.restore(state_at(0))


def test_another_tree_is_refused_by_name(store):
    store.save(state_at(1), {})
    other = state_at(1)
    with pytest.raises(LoraxError, match=r"trainable/b"):
        store.restore(other._replace(trainable={"layers": other.trainable["layers"]}))
    wide = {**other.trainable, "b": jnp.ones(2)}
    with pytest.raises(LoraxError, match=r"trainable/b is float32\[1\] there, and float32\[2\]"):
        store.restore(other._replace(trainable=wide))


def test_half_written_folders_are_not_read_and_are_swept(store):
    store.save(state_at(1), {})
    left = store.root / "00000002.writing"
    (left / "state").mkdir(parents=True)
    (left / "state" / "part").write_bytes(b"x")
    assert store.steps() == [1]
    assert_same(store.restore(state_at(0)).state, state_at(1))
    store.save(state_at(3), {})
    assert not left.exists()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(store, monkeypatch, call):
    store.save(state_at(1), {})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(LoraxError, match=r"no space left.*00000001 is intact.*--resume"):
            store.save(state_at(2), {})
    assert sorted(p.name for p in store.root.iterdir()) == ["00000001"]
    assert_same(store.restore(state_at(0)).state, state_at(1))
    store.save(state_at(2), {})
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("reserved", [True, False])
def test_a_size_limit_is_a_clean_error(store, monkeypatch, reserved):
    # As on a full disk: found by the reservation; without it, by TensorStore's own threads.
    if not reserved:
        monkeypatch.setattr(checkpoint, "_reserve", lambda folder, size: folder.mkdir(parents=True))
    store.save(state_at(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(LoraxError, match=r"00000002.*00000001 is intact"):
            store.save(state_at(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(store.restore(state_at(0)).state, state_at(1))
