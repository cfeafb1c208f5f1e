import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Example, eval_batches
from lorax.data.batches import bucket
from lorax.errors import LoraxError

tokens = st.lists(st.integers(1, 99), min_size=1, max_size=60).map(tuple)


@given(st.lists(st.builds(Example, tokens, tokens), min_size=1, max_size=25), st.integers(1, 7))
def test_every_example_once_with_its_index(many, rows):
    seen = {}
    for batch in eval_batches(many, rows, 128):
        assert batch["ids"].shape[0] == rows
        for r, index in enumerate(batch["index"].tolist()):
            live = batch["segment_ids"][r] > 0
            if index < 0:
                assert not live.any()
                assert not batch["weights"][r].any()
                continue
            ids = (*batch["ids"][r, live].tolist(), int(batch["targets"][r, live][-1]))
            assert index not in seen
            seen[index] = ids
            assert batch["weights"][r].sum() == len(many[index].completion_ids)
    assert [seen[i] for i in range(len(many))] == [example.ids for example in many]


def test_rows_of_a_batch_are_about_equally_long():
    rng = np.random.default_rng(0)
    many = [Example((1,), (2,) * int(n)) for n in rng.integers(1, 120, 200)]
    batches = list(eval_batches(many, 8, 128))
    cells = sum(batch["ids"].size for batch in batches)
    live = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    assert live / cells > 0.75
    assert len({batch["ids"].shape for batch in batches}) <= 7
    assert [batch["index"].tolist().count(-1) for batch in batches] == [0] * 25


def test_widths_stay_within_the_row():
    (batch,) = eval_batches([Example((1,), (2,) * 20)], 1, 21)
    assert batch["ids"].shape == (1, 21)


@given(st.integers(1, 5000))
def test_a_rung_holds_what_it_is_for(length):
    assert length <= bucket(length) <= max(16, 1.5 * length)
    assert bucket(bucket(length)) == bucket(length)


def test_bad_input_is_refused_before_the_first_batch():
    example = Example((1,), (2, 3, 4))
    for arguments, says in (
        (([], 4, 8), "empty"),
        (([example], 0, 8), "at least 1"),
        (([example], 4, 2), "takes 3 positions"),
    ):
        with pytest.raises(LoraxError, match=says):
            eval_batches(*arguments)
