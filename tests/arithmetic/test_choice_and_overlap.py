"""Choices, n-gram overlap and the matches beside the prefix match, against hand numbers."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlpt.reward.base import Kit
from rlpt.reward.choice import ChoiceReward, distractors, likeliest
from rlpt.reward.match import MatchReward, answer, first_token_match, predicted, span_match
from rlpt.reward.overlap import OverlapReward, overlap
from rlpt.types import Branch, Frame, Group, Markers, Prompt, Rollout, Scores, Trunk

MARKERS = Markers(opener=90, closer=91)
WORDS = {1: b"the", 2: b" cat", 3: b" sat", 4: b" on", 5: b" mat", 6: b" ", 7: b"<a>", 8: b"</a>"}
WORDS[MARKERS.closer] = b"</think>"
TEXT = [WORDS.get(index, b"") for index in range(92)]


def group(context: Sequence[int], gold: Sequence[int], *predictions: Sequence[int], frame=None):
    ids = np.array([*context, *gold])
    trunk = Trunk("d", "", 0, 0, ids, np.arange(len(ids) + 1), (len(context),))
    read = np.array([*context, MARKERS.opener])
    prompt = Prompt(trunk, len(context), len(gold), read, read, frame or Frame())
    return Group(prompt, tuple(rollout(each) for each in predictions))


def rollout(prediction: Sequence[int]) -> Rollout:
    """A thought of one token, its closer, and what it predicts."""
    ids = np.array([1, MARKERS.closer, *prediction])
    numbers = np.zeros(len(ids))
    return Rollout(ids, numbers == 0, numbers.astype(np.float32), numbers.astype(int), 1, "closer")


def rewards(cfg, *groups: Group, scorers=None) -> list[list[float]]:
    kit = Kit(scorers or {}, MARKERS, centred=True, token_bytes=lambda: TEXT)
    return cfg.build(kit)(groups).reward_PG.tolist()


def test_overlap_is_the_f1_of_shared_grams():
    """the cat sat / the cat ran home: 2 of 3 and of 4 words, 1 of 2 and of 3 pairs."""
    ours, theirs = "the cat sat", "the cat ran home"
    assert overlap(ours, theirs, 1) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert overlap(ours, theirs, 2) == pytest.approx(2 * 1 / (2 + 3))
    assert overlap(ours, theirs, 3) == 0.0
    assert overlap("a a a", "a b", 1) == pytest.approx(2 * 1 / (3 + 2))
    assert overlap("", "a", 1) == overlap("a", "a", 2) == 0.0


def test_overlap_reads_predictions():
    found = rewards(OverlapReward(kind="overlap"), group([5], [1, 2, 3], [1, 2], [4], []))
    assert found == [[pytest.approx(2 * 2 / (2 + 3)), 0.0, 0.0]]


def test_the_likeliest_option_wins_and_a_tie_is_no_choice():
    gold_G = np.array([-1.0, -2.0, -3.0])
    other_GK = np.array([[-2.0, -1.5], [-2.0, -4.0], [-2.0, -9.0]])
    assert likeliest(gold_G, other_GK).tolist() == [1.0, 0.0, 0.0]


def test_distractors_are_spread_from_the_first_to_the_last_of_the_context():
    def starts(size: int, count: int) -> list[int]:
        return [int(span[0]) for span in distractors(group(range(size), [50, 51]), count)]

    assert starts(10, 3) == [0, 4, 8]
    assert starts(10, 1) == [0]
    assert starts(3, 3) == [0, 1]
    assert starts(1, 3) == []
    same = group([50, 51, 7, 8], [50, 51])
    assert [span.tolist() for span in distractors(same, 2)] == [[7, 8]]


class ByFirst:
    """A scorer whose log-probability of a target is looked up by its first token."""

    def __init__(self, known: dict[int, float]) -> None:
        self.known = known
        self.asked: list[int] = []

    def branches(self, pairs: Sequence[tuple[Trunk, Branch]]) -> list[Scores]:
        firsts = [int(branch.ids[branch.score_start]) for _, branch in pairs]
        self.asked += firsts
        return [
            Scores(np.array([self.known[n], 0.0], np.float32), np.zeros(2, int)) for n in firsts
        ]

    def trunks(self, spans: Sequence[tuple[Trunk, int, int]]) -> list[Scores]:
        raise AssertionError(spans)


@pytest.mark.parametrize(
    ("gold", "context", "reward"),
    [(-1.0, range(4), 1.0), (-2.5, range(4), 0.0), (-1.0, range(2), 1.0), (-1.0, [0], 0.0)],
    ids=["likeliest", "beaten", "one_other", "no_other"],
)
def test_a_choice_compares_gold_with_its_own_context(gold, context, reward):
    scorer = ByFirst({0: -2.0, 1: -3.0, 2: -4.0, 50: gold})
    found = rewards(
        ChoiceReward(kind="choice", options=3),
        group(context, [50, 51], [], []),
        scorers={"policy": scorer},
    )
    assert found == [[reward, reward]]


def test_as_many_options_are_scored_as_were_asked_for():
    """Of each of two rollouts: the gold text, and two stretches at the ends of the context."""
    scorer = ByFirst(dict.fromkeys(range(52), 0.0))
    cfg = ChoiceReward(kind="choice", options=3)
    rewards(cfg, group(range(10), [50, 51], [], []), scorers={"policy": scorer})
    assert scorer.asked == [50, 0, 8] * 2
    assert cfg.passes(read=False, centred=True) == (3, 0)


@pytest.mark.parametrize(
    ("prediction", "first", "span"),
    [(b"the", 1, 0), (b"the cat", 1, 1), (b" the cat ", 0, 1), (b"th", 0, 0), (b"", 0, 0)],
)
def test_first_token_and_span_by_hand(prediction, first, span):
    gold = [b"the", b" cat", b" "]
    assert first_token_match(prediction, gold) == first
    assert span_match(prediction, gold) == span
    assert first_token_match(prediction, [b"", *gold]) == first
    assert first_token_match(b"x", [b"", b""]) == first_token_match(b"", [b""]) == 0.0
    assert first_token_match(b"x", [b""]) == span_match(b" ", [b" "]) == 0.0


@pytest.mark.parametrize(
    ("how", "expected"), [("prefix", [1.0, 0.0]), ("first_token", [1.0, 1.0]), ("span", [0.0, 0.0])]
)
def test_every_match_reads_predictions_without_their_closer(how, expected):
    made = group([5], [1, 2, 3], [1, 2, MARKERS.closer], [1, 6])
    assert rewards(MatchReward(kind="match", how=how), made) == [expected]


def test_the_answer_is_what_stands_in_the_last_whole_pair_of_marks():
    marks = (b"<a>", b"</a>")
    assert answer(b"x<a>one</a> y<a>two</a> z", *marks) == b"two"
    assert answer(b"<a>one</a><a>open", *marks) == b"one"
    assert answer(b"<a><a>in</a>", *marks) == b"in"
    assert answer(b"two</a>", *marks) == answer(b"<a>two", *marks) == answer(b"two", *marks) == b""
    framed = group([5], [1], [7, 2, 8], frame=Frame(answer=marks))
    assert predicted(framed, 0, MARKERS.closer, TEXT) == b" cat"
