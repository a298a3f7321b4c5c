"""The answer reward by hand: which texts are which number, and what counts as the answer of a prediction."""

from fractions import Fraction

import numpy as np
import pytest

from rlpt.reward.answer import AnswerReward, exact_match, first_line, number, numeric_match
from rlpt.reward.base import Kit
from rlpt.types import Group, Markers, Prompt, Rollout, Trunk

NUMBERS = {
    "18": 18,
    "$1,200.00": 1200,
    "1,200,000.5": Fraction(2400001, 2),
    "-5": -5,
    "\u22125": -5,
    "x = -$5": -5,
    "$-5": -5,
    "10-3": 3,
    "10 - 3": 3,
    "(10)-3": 3,
    ".5": Fraction(1, 2),
    "0.50": Fraction(1, 2),
    "1/2": Fraction(1, 2),
    "3/0": 0,
    "50%": 50,
    "12,34": 34,
    "1,2345": 2345,
    "1.5.2": 2,
    "5.": 5,
    "He ate 3, 4 and 5.": 5,
    "none": None,
    "\uff11\uff18": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=ascii)
def test_the_number_of_a_text_is_its_last(text: str) -> None:
    assert number(text) == NUMBERS[text]


def test_a_number_may_have_more_digits_than_python_reads() -> None:
    assert number("9" * 6000) == Fraction(10) ** 6000 - 1


def test_an_answer_is_the_first_line_that_says_something() -> None:
    assert first_line("\n\n  18 \nQuestion: 5") == "18"
    assert first_line(" \n") == ""


def test_numbers_match_by_value_and_texts_by_letter() -> None:
    assert numeric_match(" 6 * 3 = $18.00\n19", "18") == 1.0
    assert numeric_match("19", "18") == 0.0
    assert numeric_match("18\n", "eighteen") == 0.0
    assert numeric_match("", "18") == 0.0
    assert numeric_match("eighteen", "18") == 0.0
    assert exact_match(" Paris \nQuestion", " Paris") == 1.0
    assert exact_match("Paris.", "Paris") == 0.0
    assert exact_match("", "") == 0.0


def test_a_group_is_paid_for_what_stands_after_the_thought() -> None:
    token_bytes = [b"1", b"8", b" ", b"\n", b"", b""]
    trunk = Trunk("d", "", 0, 0, np.array([2, 2, 0, 1]), np.arange(5), (1,))
    prompt = Prompt(trunk, 1, 3, np.array([2, 4]), np.array([2, 4]))

    def rollout(*ids: int) -> Rollout:
        # A thought of one token, then the closer, which is 5.
        whole = np.array([0, 5, *ids])
        sampled = np.ones(len(whole), bool)
        return Rollout(whole, sampled, np.zeros(len(whole)), np.zeros_like(whole), 1, "closer")

    group = Group(prompt, (rollout(0, 1, 3, 0), rollout(0, 5), rollout(2, 0, 1), rollout()))
    reward = AnswerReward(how="numeric").build(Kit({}, Markers(4, 5), True, lambda: token_bytes))
    rewarded = reward([group])
    np.testing.assert_array_equal(rewarded.reward_PG, [[1.0, 0.0, 1.0, 0.0]])
    assert rewarded.sums == {"reward/answer": (2.0, 4.0)}
