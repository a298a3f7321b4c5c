"""What thoughts on their way into an update look like, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from rlpt.gaming import GRAM, leaking, signs, thought_sums
from rlpt.types import Group, Prompt, Rollout, Trunk

CONTEXT, CONTINUATION = [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]
"""3 4 5 6 stands in the context, too; 4 5 6 7 and 5 6 7 8 do not."""


def rollout(*thought: int, finish: str = "closer") -> Rollout:
    count = len(thought) + 1
    action = np.ones(count, dtype=bool)
    action[-1] = finish == "closer"
    return Rollout(
        np.array([*thought, 99]),
        action,
        np.where(action, -0.5, 0.0).astype(np.float32),
        np.zeros(count, dtype=np.int64),
        len(thought),
        finish,
    )


def group(*rollouts: Rollout, context=CONTEXT, continuation=CONTINUATION) -> Group:
    ids = np.array([*context, *continuation])
    read = ids[: len(context)]
    trunk = Trunk("doc", "", 0, 0, ids, np.arange(len(ids) + 1), (len(read),))
    return Group(Prompt(trunk, len(read), len(continuation), read, read), rollouts)


@pytest.mark.parametrize(("thought", "leaks"), [
    ((4, 5, 6, 7), True),
    ((9, 9, 5, 6, 7, 8, 9), True),
    ((3, 4, 5, 6), False),
    ((5, 6, 7), False),
    ((8, 7, 6, 5), False),
    ((5, 6, 9, 7, 8), False),
    ((), False),
])  # fmt: skip
def test_a_thought_leaks_that_says_four_new_tokens_of_the_held_out_text(thought, leaks) -> None:
    assert leaking(group(rollout(*thought))).tolist() == [leaks]


def test_a_gram_that_begins_in_one_thought_and_ends_in_the_next_is_nobodys() -> None:
    found = leaking(group(rollout(5, 6), rollout(7, 8), rollout(), rollout(5, 6, 7, 8)))
    assert found.tolist() == [False, False, False, True]


@pytest.mark.parametrize("seed", range(5))
def test_leaks_are_those_of_a_search_one_by_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, 3, size).tolist() for size in (9, 12)]
    thoughts = [draw.integers(0, 3, draw.integers(0, 12)).tolist() for _ in range(40)]
    found = leaking(
        group(*(rollout(*each) for each in thoughts), context=texts[0], continuation=texts[1])
    )

    def grams(ids: list[int]) -> set[tuple]:
        return {tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)}

    secret = grams(texts[1]) - grams(texts[0])
    assert found.tolist() == [bool(grams(each) & secret) for each in thoughts]
    assert 0 < found.sum() < 40


def test_texts_with_nothing_to_give_away_are_not_counted() -> None:
    """One shorter than a gram, one that stands in the context, one that the prompt showed."""
    said = rollout(*CONTINUATION)
    short, known = group(said, continuation=[7, 8, 9]), group(said, continuation=[2, 3, 4, 5])
    assert leaking(short) is None
    assert leaking(known) is None
    shown = replace(group(said), hinted=True)
    found = signs([short, known, shown, group(said), group(rollout(1))], np.zeros((5, 1)))
    assert found["thought/leak_rate"] == (1.0, 2.0)


def test_lengths_by_the_sign_of_the_advantage() -> None:
    groups = [
        group(rollout(1), rollout(1, 2), rollout(1, 2, 3)),
        group(rollout(*range(9)), rollout(), rollout(1)),
    ]
    found = signs(groups, np.array([[0.5, -0.5, 0.0], [2.0, -1.0, -1.0]]))
    assert found["thought/length_positive"] == (10.0, 2.0)
    assert found["thought/length_negative"] == (3.0, 3.0)


def test_thoughts_in_sums() -> None:
    groups = [group(rollout(1, 2), rollout(1, 2, 3, finish="budget"), rollout(1))]
    found = thought_sums(groups, np.array([[1.0, -1.0, 0.0]]))
    assert found["thought/length"] == (6.0, 3.0)
    assert found["thought/closer_rate"] == (2.0, 3.0)
    assert found["thought/nll"] == (4.0, 8.0)
    assert found["tokens/rollout"] == (9.0, 1.0)


def test_a_rank_without_groups_has_the_names_of_the_others() -> None:
    empty = thought_sums([], np.zeros((0, 1)))
    full = thought_sums([group(rollout(1))], np.zeros((1, 1)))
    assert empty.keys() == full.keys()
    assert all(pair == (0.0, 0.0) for name, pair in empty.items() if name != "tokens/rollout")
