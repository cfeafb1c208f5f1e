import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Example, Examples
from lorax.data.packing import Filling, assemble, count_batches

WIDTH = 16
tokens = st.lists(st.integers(1, 99), min_size=1, max_size=8).map(tuple)
documents = st.lists(st.builds(Example, tokens, tokens), min_size=1, max_size=20)


def pack(many, rows=3, width=WIDTH):
    """Batches of one pass over the documents, in order."""
    filling, batches = Filling(rows, width), []
    for i, length in enumerate(many.lengths.tolist()):
        if not filling.put(i, length):
            batches.append(filling.rows)
            filling = Filling(rows, width)
            assert filling.put(i, length)
    return [*batches, filling.rows]


def segments(batch):
    """(row, span) of every document in a batch."""
    for r, row in enumerate(batch["segment_ids"]):
        for segment in range(1, row.max() + 1):
            (where,) = np.nonzero(row == segment)
            yield r, where


@given(documents)
def test_every_token_of_every_document_once_in_order(docs):
    many = Examples.of(docs)
    found = []
    for rows in pack(many):
        batch = assemble(many, rows, WIDTH)
        for (r, where), index in zip(segments(batch), [i for row in rows for i in row], strict=True):
            assert where.tolist() == list(range(where[0], where[-1] + 1))  # unbroken
            ids = [*batch["ids"][r, where].tolist(), int(batch["targets"][r, where[-1]])]
            assert tuple(ids) == docs[index].ids
            assert batch["targets"][r, where[:-1]].tolist() == ids[1:-1]
            assert batch["positions"][r, where].tolist() == list(range(len(where)))
            assert batch["weights"][r, where].tolist() == list(docs[index].token_weights[1:])
            found.append(index)
    assert sorted(found) == list(range(len(docs)))


@given(documents)
def test_padding_is_zero_everywhere(docs):
    many = Examples.of(docs)
    for rows in pack(many):
        batch = assemble(many, rows, WIDTH)
        empty = batch["segment_ids"] == 0
        assert all((batch[name][empty] == 0).all() for name in batch)
        assert (~empty).sum() == sum(many.lengths[i] for row in rows for i in row)


@given(documents)
def test_only_completion_tokens_are_counted(docs):
    many = Examples.of(docs)
    counted = sum(assemble(many, rows, WIDTH)["weights"].sum() for rows in pack(many))
    assert counted == sum(len(d.completion_ids) for d in docs)


def test_shapes_and_types():
    many = Examples.of([Example((1, 2), (3,))])
    batch = assemble(many, [[0], [], [0, 0]], 5)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "ids": ((3, 5), "int32"),
        "targets": ((3, 5), "int32"),
        "positions": ((3, 5), "int32"),
        "segment_ids": ((3, 5), "int32"),
        "weights": ((3, 5), "float32"),
    }
    assert batch["segment_ids"][2].tolist() == [1, 1, 2, 2, 0]
    assert batch["targets"][2].tolist() == [2, 3, 2, 3, 0]


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="do not fit in 3"):
        assemble(Examples.of([Example((1, 2), (3,))]), [[0, 0]], 3)


def test_one_document_to_a_row():
    filling = Filling(2, 9, most=1)
    assert [filling.put(i, 2) for i in range(3)] == [True, True, False]
    assert filling.rows == [[0], [1]]


@given(documents)
def test_the_count_of_batches_is_that_of_the_pass(docs):
    many = Examples.of(docs)
    batches = pack(many)
    counted = count_batches(many.lengths.tolist(), 3, WIDTH)
    assert len(batches) - 1 < counted
    assert counted <= len(batches) - 1 + 2  # the part left over is measured by the mean full batch


def attend(ids, positions, segment_ids):
    """Causal attention inside segments, in float64, with random features by token and position."""
    rng = np.random.default_rng(0)
    by_token, by_place = rng.normal(size=(100, 6)), rng.normal(size=(WIDTH, 6))
    x = by_token[ids] + by_place[positions]
    scores = x @ x.T
    order = np.arange(len(ids))
    allowed = (segment_ids[:, None] == segment_ids) & (order[:, None] >= order)
    weights = np.where(allowed, np.exp(scores - scores.max()), 0)
    return weights @ x / weights.sum(-1, keepdims=True)


@given(documents)
def test_attention_inside_a_pack_is_attention_alone(docs):
    many = Examples.of(docs)
    for rows in pack(many):
        batch = assemble(many, rows, WIDTH)
        for (r, where), index in zip(segments(batch), [i for row in rows for i in row], strict=True):
            packed = attend(batch["ids"][r], batch["positions"][r], batch["segment_ids"][r])[where]
            ids = np.array(docs[index].ids[:-1])
            alone = attend(ids, np.arange(len(ids)), np.ones(len(ids)))
            np.testing.assert_allclose(packed, alone, rtol=1e-9, atol=1e-12)
