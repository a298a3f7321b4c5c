"""The learned masker by hand: where proposals stand, why they are refused, what both tasks are worth."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlpt.reward.base import Kit
from rlpt.reward.gates import FormatGate, Gated
from rlpt.reward.masker import REASONS, Coupled, MaskerConfig, Placing, Span, difficulty, place
from rlpt.reward.match import MatchReward
from rlpt.types import Group, Markers, Prompt, Rollout, Trunk

MARKERS = Markers(opener=90, closer=91)
WORDS = ["The", " cat", " sat", " on", " the", " mat", ".", " The", " cat", " ran"]
TEXT = [b"", *(word.encode() for word in WORDS), *[b""] * 81]
TOKENS = TEXT[1:11]
ASK = MaskerConfig(instruction="mask:")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b"sat", Span(2, 3)),
        (b" sat on\n", Span(2, 4)),
        (b"mat.", Span(5, 7)),
        (b"cat", Span(1, 2)),
        # The first stands at the beginning, the second fits.
        (b"The", Span(7, 8)),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"dog", "absent"),
        (b"sat  on", "absent"),
        (b"at o", "torn"),
        (b"at on", "torn"),
        (b"t s", "torn"),
        (b"ran", "edge"),
        (b"The cat sat", "edge"),
    ],
)
def test_a_proposal_is_the_tokens_that_cover_it_or_is_refused(
    said: bytes, found: Span | str
) -> None:
    assert place(said, TOKENS, ASK) == found


@pytest.mark.parametrize(
    ("said", "changes", "found"),
    [
        (b"cat", {"most_occurrences": 2}, Span(1, 2)),
        (b"cat", {"most_occurrences": 1}, "frequent"),
        (b"sat", {"min_tokens": 2}, "short"),
        (b"sat on", {"min_tokens": 2, "max_tokens": 2}, Span(2, 4)),
        (b"sat on the", {"max_tokens": 2}, "long"),
        (b"sat", {"edge_tokens": 2}, Span(2, 3)),
        (b"sat", {"edge_tokens": 3}, "edge"),
        (b"The", {"edge_tokens": 2}, Span(7, 8)),
        (b"The", {"edge_tokens": 3}, "edge"),
    ],
)
def test_the_limits_of_a_span_are_inside_it(said: bytes, changes: dict, found: Span | str) -> None:
    assert place(said, TOKENS, ASK.model_copy(update=changes)) == found


def test_spaces_belong_to_their_tokens_and_tokens_without_bytes_to_nothing() -> None:
    tokens = [b"a", b"", b" b\n", b"", b"c d", b"e"]
    assert place(b"b", tokens, ASK) == Span(2, 3)
    assert place(b"c d", tokens, ASK) == Span(4, 5)
    assert place(b"c", tokens, ASK) == "torn"


def test_places_may_overlap() -> None:
    """aa stands at three places of xaaaay, of which the middle one alone is a token; aba at two of xababay."""
    tokens = [b"x", b"a", b"aa", b"a", b"y"]
    assert place(b"aa", tokens, ASK) == Span(2, 3)
    assert place(b"aa", tokens, ASK.model_copy(update={"most_occurrences": 2})) == "frequent"
    assert place(b"aba", [b"x", b"ab", b"aba", b"y"], ASK) == Span(2, 3)


def test_what_is_never_solved_is_worth_as_little_as_what_always_is() -> None:
    assert [difficulty(mean) for mean in (0.0, 0.125, 0.75, 1.0)] == [0.0, 0.875, 0.25, 0.0]


def rollout(said: str) -> Rollout:
    """A thought of one token, its closer, and a prediction."""
    ids: list[int] = [1, MARKERS.closer]
    while said:
        word = next(word for word in WORDS if said.startswith(word))
        ids.append(WORDS.index(word) + 1)
        said = said.removeprefix(word)
    numbers = np.zeros(len(ids))
    return Rollout(
        np.array(ids), numbers == 0, numbers.astype(np.float32), numbers.astype(int), 1, "closer"
    )


def group(document: str, start: int, gold: Sequence[int], *said: str) -> Group:
    """Of a cut at token ``start`` of a document, behind the whole paragraph or one token of it."""
    context = [] if gold else list(range(1, 11))
    ids = np.array([*context, *gold])
    trunk = Trunk(
        document, "", 0, start - len(context), ids, np.arange(len(ids) + 1), (len(context),)
    )
    read = np.array([*context, MARKERS.opener])
    prompt = Prompt(trunk, len(context), len(gold), read, read)
    return Group(prompt, tuple(rollout(each) for each in said))


def groups() -> list[Group]:
    """Paragraph a stands at token 100: a hard mask, proposed twice, an easy one and a refusal. Paragraph b, at 40: an
    impossible mask; two of its spans begin at one token."""
    return [
        group("a", 110, (), " sat", " mat.", " sat", " sat on the mat. The cat"),
        group("a", 102, [3], " sat", " cat", "", " sat on"),
        group("a", 105, [6, 7], " mat.", " mat.", " mat.", " mat."),
        group("b", 50, (), " on", " ran", " on the", " on the"),
        group("b", 43, [4], " cat", "", " ran", " the"),
        group("b", 43, [4, 5], " on the", " on", " on", " on the"),
    ]


def coupled() -> Coupled:
    kit = Kit({}, MARKERS, centred=True, token_bytes=lambda: TEXT)
    ask = ASK.model_copy(update={"max_tokens": 5})
    matches = MatchReward(kind="match", how="span").build(kit)
    return Coupled(matches, Placing(ask, MARKERS.closer, lambda: TEXT))


EXPECTED = [
    [0.75, 0.0, 0.75, 0.0],
    [1.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 0.0, 0.5, 0.5],
    [0.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 1.0],
]


def test_proposals_and_predictions_are_worth_what_they_are_by_hand() -> None:
    rewarded = coupled()(groups())
    assert rewarded.reward_PG.tolist() == EXPECTED
    sums = rewarded.sums
    assert sums["reward/proposal"] == (2.5, 8.0)
    assert sums["reward/match"] == (7.0, 16.0)


def test_every_proposal_and_every_mask_is_counted() -> None:
    sums = coupled()(groups()).sums
    assert sums["masker/accepted"] == (6.0, 8.0)
    refused = {reason: sums[f"masker/{reason}"] for reason in REASONS}
    assert refused == {reason: (float(reason in ("long", "edge")), 8.0) for reason in REASONS}
    assert sums["masker/masks"] == (4.0, 2.0)
    assert sums["masker/tokens"] == (1.0 + 2.0 + 1.0 + 2.0, 4.0)
    for part, never, always in ((groups()[:3], 0.0, 1.0), (groups()[3:], 1.0, 0.0)):
        sums = coupled()(part).sums
        assert sums["masker/never_solved"] == (never, 2.0)
        assert sums["masker/always_solved"] == (always, 2.0)


def test_paragraphs_may_stand_anywhere_among_their_masks() -> None:
    order = [5, 3, 1, 0, 4, 2]
    shuffled = [groups()[p] for p in order]
    assert coupled()(shuffled).reward_PG.tolist() == [EXPECTED[p] for p in order]


def test_without_any_mask_all_is_refused_and_the_same_things_are_logged() -> None:
    refused = group("a", 110, (), " ran", "", " ran", "")
    rewarded = coupled()([refused])
    assert rewarded.reward_PG.tolist() == [[0.0] * 4]
    assert rewarded.sums.keys() == coupled()(groups()).sums.keys()
    assert rewarded.sums["masker/empty"] == (2.0, 4.0)
    assert rewarded.sums["masker/tokens"] == (0.0, 0.0)


def test_gates_look_at_both_tasks() -> None:
    gate = FormatGate(kind="format", min_prediction_tokens=2)
    found = Gated(coupled(), (gate,))(groups()).reward_PG
    assert found[0].tolist() == found[1].tolist() == [0.0] * 4
    assert found[2].tolist() == [1.0] * 4
    # A mask is as hard as its predictions are wrong, whatever gates make of these.
    assert found[3].tolist() == [0.0, 0.0, 0.5, 0.5]
    assert found[5].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_span_needs_a_length() -> None:
    with pytest.raises(ValueError, match="min_tokens = 3 exceeds max_tokens = 2"):
        MaskerConfig(instruction="mask:", min_tokens=3, max_tokens=2)
