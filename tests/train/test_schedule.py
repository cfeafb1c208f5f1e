import math

import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.train.schedule import learning_rate


def rates(steps, **kwargs):
    f = learning_rate(2.0, steps, **kwargs)
    return np.array([float(f(i)) for i in range(steps)])


def test_warmup_rises_from_the_first_step():
    np.testing.assert_allclose(rates(6, warmup=4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_and_cosine_end_above_zero():
    np.testing.assert_allclose(rates(4, shape="linear"), [2.0, 1.5, 1.0, 0.5])
    want = [1 + math.cos(math.pi * t / 5) for t in range(5)]
    np.testing.assert_allclose(rates(7, warmup=2, shape="cosine")[2:], want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [-1, 5, 6])
def test_a_warmup_that_does_not_fit_is_refused(warmup):
    with pytest.raises(LoraxError, match="warmup"):
        learning_rate(1.0, 5, warmup=warmup)


def test_an_unknown_shape_names_the_choices():
    with pytest.raises(LoraxError, match="constant, linear, cosine"):
        learning_rate(1.0, 5, shape="triangle")
