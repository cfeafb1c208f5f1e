import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Example, Examples, data_hash
from lorax.errors import LoraxError

tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9).map(tuple)
examples = st.lists(st.builds(Example, tokens, tokens), max_size=12)


@given(examples)
def test_flat_arrays_give_back_the_same_examples(many):
    held = Examples.of(many)
    assert list(held) == many
    assert [len(e.ids) - 1 for e in many] == held.lengths.tolist()
    assert list(held[1:3]) == many[1:3]


def test_weights_survive_the_flat_arrays():
    example = Example((1, 2), (3, 4, 5, 6), (1.0, 0.0, 0.5, 1.0))
    held = Examples.of([example, Example((9,), (8,))])
    assert held[0] == example
    assert held[-1] == Example((9,), (8,))
    assert held.tokens(0)[1].tolist() == [0, 0, 1, 0, 0.5, 1]


def test_an_index_outside_ends_iteration_and_raises():
    held = Examples.of([Example((1,), (2,))])
    for index in (1, -2):
        with pytest.raises(IndexError):
            held[index]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (((), (1,)), "empty prompt"),
        (((1,), ()), "empty completion"),
        (((1,), (2, 3), (1.0,)), "1 weights for 2"),
        (((1,), (2, 3), (0.0, 0.0)), "all zero"),
        (((1,), (2, 3), (1.0, -1.0)), "negative"),
    ],
)
def test_impossible_examples_are_refused(parts, says):
    with pytest.raises(LoraxError, match=says):
        Example(*parts)


def test_the_hash_sees_tokens_borders_weights_and_order():
    base = [Example((1, 2), (3, 4)), Example((5,), (6, 7))]
    others = [
        [Example((1,), (2, 3, 4)), Example((5,), (6, 7))],
        [Example((1, 2), (3, 4)), Example((5,), (6, 8))],
        [Example((1, 2), (3, 4), (1.0, 0.0)), Example((5,), (6, 7))],
        base[::-1],
        base[:1],
    ]
    assert len({data_hash(e) for e in [base, *others]}) == 6
    assert data_hash(base) == data_hash(Examples.of(base))


def test_the_hash_of_known_examples_does_not_change():
    # Run records keep it: another value would refuse to resume every older run.
    assert data_hash([Example((1, 2), (3, 4))]) == KNOWN


KNOWN = "ce80c9dc8845d761f60e56f09ad631f9e0c190b7a7ce57b646c766b4e94967a5"
