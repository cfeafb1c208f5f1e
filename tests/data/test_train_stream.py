import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.data import Example, Examples, TrainStream
from lorax.errors import LoraxError


def some(count, seed=0):
    rng = np.random.default_rng(seed)

    def ids(most):
        return tuple(rng.integers(1, 99, rng.integers(1, most)).tolist())

    # The first token tells an example from the others.
    return Examples.of(Example((i + 100, *ids(7)), ids(5)) for i in range(count))


MANY = some(23)


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return len(a) == len(b) and all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x)


def order(batches):
    """Which examples come, row by row."""
    starts = [(b["positions"] == 0) & (b["segment_ids"] > 0) for b in batches]
    return [int(i) - 100 for b, s in zip(batches, starts, strict=True) for i in b["ids"][s]]


@pytest.mark.parametrize("pack", [False, True])
def test_each_epoch_has_every_example_once_and_its_own_order(pack):
    seen = order(take(TrainStream(MANY, 4, 16, pack=pack), 30))
    if pack:  # first fit puts a short document into an earlier row: compare sets
        assert sorted(set(seen)) == list(range(23))
        counts = np.bincount(seen)
        assert counts.max() - counts.min() <= 1 + 1
        return
    epochs = [seen[i : i + 23] for i in range(0, len(seen) - 22, 23)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


@pytest.mark.parametrize("pack", [False, True])
def test_the_seed_decides_everything(pack):
    first, again, other = (take(TrainStream(MANY, 4, 16, seed=s, pack=pack), 8) for s in (3, 3, 4))
    assert same(first, again)
    assert order(first) != order(other)


def test_any_whole_number_is_a_seed():
    streams = [order(take(TrainStream(MANY, 4, 16, seed=s), 3)) for s in (0, 2**32, 2**70)]
    assert len(set(map(tuple, streams))) == 3


@settings(max_examples=20, deadline=None)
@given(
    pack=st.booleans(),
    before=st.integers(0, 25),
    sizes=st.tuples(st.integers(1, 5), st.integers(11, 40)),
    seed=st.integers(0, 9),
)
def test_a_restored_stream_continues_to_the_bit(pack, before, sizes, seed):
    rows, width = sizes
    stream = TrainStream(MANY, rows, width, seed=seed, pack=pack)
    take(stream, before)
    place = json.dumps(stream.state())
    rest = take(stream, 9)
    other = TrainStream(MANY, rows, width, seed=seed, pack=pack)
    other.restore(json.loads(place))
    assert json.dumps(other.state()) == place
    assert same(take(other, 9), rest)
    stream.restore(json.loads(place))  # a stream that has read on can be taken back as well
    assert same(take(stream, 9), rest)


def test_a_place_in_the_middle_of_a_pack_keeps_the_document_that_did_not_fit():
    lengths = [9, 9, 9, 9, 9]
    many = Examples.of(Example((i + 100,), tuple(range(1, n + 1))) for i, n in enumerate(lengths))
    stream = TrainStream(many, 1, 16, pack=True)
    next(stream)
    place = stream.state()
    assert stream._pending is not None  # one was read that the first batch had no room for
    assert place["order"]["next_index"] == 1
    other = TrainStream(many, 1, 16, pack=True)
    other.restore(place)
    assert sorted(order(take(other, 4)) + order(take(TrainStream(many, 1, 16, pack=True), 1))) == [0, 1, 2, 3, 4]


def test_another_process_continues_too(tmp_path):
    stream = TrainStream(MANY, 3, 16, seed=5, pack=True)
    take(stream, 4)
    (tmp_path / "place.json").write_text(json.dumps(stream.state()))
    np.savez(tmp_path / "data.npz", *(getattr(MANY, name) for name in ("ids", "weights", "starts", "prompts")))
    code = (
        "import json, sys, numpy as np; from lorax.data import Examples, TrainStream\n"
        "data = np.load('data.npz'); stream = TrainStream(Examples(*data.values()), 3, 16, seed=5, pack=True)\n"
        "stream.restore(json.load(open('place.json')))\n"
        "np.save('ids.npy', np.stack([next(stream)['ids'] for _ in range(6)]))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (np.load(tmp_path / "ids.npy") == np.stack([b["ids"] for b in take(stream, 6)])).all()


def test_the_order_is_the_same_on_every_machine():
    # Resuming elsewhere, or after an update, must not change what is read.
    assert order(take(TrainStream(MANY, 4, 16, seed=1), 3)) == KNOWN


def test_one_width_for_all_batches():
    assert {b["ids"].shape for b in take(TrainStream(MANY, 4, 500), 20)} == {(4, 16)}
    assert {b["ids"].shape for b in take(TrainStream(MANY, 4, 11), 20)} == {(4, 11)}
    assert {b["ids"].shape for b in take(TrainStream(MANY, 4, 50, pack=True), 20)} == {(4, 50)}


def test_batches_per_epoch():
    assert TrainStream(MANY, 4, 16).batches_per_epoch == 23 / 4
    stream = TrainStream(MANY, 2, 16, pack=True)
    whole = int(stream.batches_per_epoch)
    assert len(set(order(take(stream, whole)))) <= 23
    assert len(set(order(take(TrainStream(MANY, 2, 16, pack=True), whole + 1)))) == 23


def test_fewer_examples_than_rows():
    batch = next(TrainStream(MANY[:2], 5, 16))
    assert sorted(set(order([batch]))) == [0, 1]
    assert (batch["segment_ids"].max(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed=0 but the stream has 1"),
        ({"batch_size": 2}, "batch_size=4 but"),
        ({"pack": True}, "pack=False but"),
        ({"examples": some(23, seed=1)}, "data="),
    ],
)
def test_a_place_of_another_stream_is_refused(change, says):
    settings = {"examples": MANY, "batch_size": 4, "seq_len": 16, "seed": 0, "pack": False}
    place = TrainStream(**settings).state()
    with pytest.raises(LoraxError, match=says):
        TrainStream(**settings | change).restore(place)


@pytest.mark.parametrize("place", [{}, None, [], {"order": 3}, {"order": {"next_index": "x"}}])
def test_a_damaged_place_is_refused(place):
    stream = TrainStream(MANY, 4, 16)
    if isinstance(place, dict) and "order" in place:
        place = stream.state() | place
    with pytest.raises(LoraxError, match="cannot be read"):
        stream.restore(place)


def test_bad_sizes_and_data():
    with pytest.raises(LoraxError, match="empty"):
        TrainStream([], 4, 16)
    with pytest.raises(LoraxError, match="batch_size is 0"):
        TrainStream(MANY, 0, 16)
    with pytest.raises(LoraxError, match=r"takes 10 positions and a row has seq_len=9"):
        TrainStream(MANY, 4, 9)


KNOWN = [12, 5, 16, 14, 19, 6, 1, 8, 21, 17, 7, 2]
