"""The checker is on in tests, and agrees with pyright about numbers."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rlpt import statistics, types


def test_a_wrong_shape_and_a_wrong_type_are_caught_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        types.Scores(logp=np.zeros((2, 2), np.float32), argmax=np.zeros(2, np.int64))
    with pytest.raises(TypeCheckError):
        types.Markers(opener="<think>", closer=3)  # pyright: ignore[reportArgumentType]


def test_an_int_stands_for_a_float() -> None:
    assert statistics.Interval(1, 0, 2, 30).mean == 1
