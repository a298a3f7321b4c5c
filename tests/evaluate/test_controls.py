"""Every control is what its definition says, and a draw depends on its key alone."""

import numpy as np
import pytest

from rlpt import rng
from rlpt.evaluate.controls import (
    ANY_SAMPLE,
    Lineup,
    Partners,
    context_copy,
    filler,
    named_prefix,
    shuffled,
)
from rlpt.types import bare_branch
from rlpt_data.strict import UserError


def draw(part=0):
    return rng.generator(0, "test", part)


def test_filler_has_the_thoughts_length_and_only_neutral_tokens():
    assert filler(5, [8, 9]).tolist() == [8, 9, 8, 9, 8]
    assert filler(0, [8]).tolist() == []


def test_context_copy_is_a_span_of_the_context_and_every_position_occurs(tiny):
    prompt = tiny.prompt("a", [1, 2, 3, 4, 5], [0, 0])
    spans = {tuple(context_copy(prompt, 3, draw(i)).tolist()) for i in range(100)}
    assert spans == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}


def test_a_context_shorter_than_the_thought_is_repeated(tiny):
    assert context_copy(tiny.prompt("a", [1, 2], [0]), 5, draw()).tolist() == [1, 2, 1, 2, 1]


def test_shuffling_keeps_the_tokens_and_moves_them():
    thought = np.arange(20)
    moved = shuffled(thought, draw())
    assert sorted(moved.tolist()) == thought.tolist()
    assert moved.tolist() != thought.tolist()


@pytest.mark.parametrize(
    ("thought", "continuation", "length"),
    [
        ([1, 2, 3], [4, 5], 0),
        ([4, 9, 4, 5, 6], [4, 5], 2),
        ([4], [4, 5], 1),
        ([], [4], 0),
        ([4, 4, 5], [4, 5, 6], 2),
    ],
)
def test_named_prefix_is_the_longest_prefix_of_the_text_inside_the_thought(
    thought, continuation, length
):
    assert named_prefix(np.array(thought, dtype=int), np.array(continuation)) == length


def test_a_bare_branch_has_no_markers_and_is_scored_from_its_first_token(tiny):
    branch = bare_branch(tiny.prompt("a", [1, 2, 3], [4, 5]))
    assert (branch.cut, branch.ids.tolist(), branch.score_start) == (3, [4, 5], 0)


def test_a_partner_is_of_another_document_and_of_the_same_domain_where_there_is_one(tiny):
    prompts = [
        tiny.prompt("a", [1], [2], "x"),
        tiny.prompt("a", [1, 1], [3], "x"),
        tiny.prompt("b", [1], [4], "x"),
        tiny.prompt("c", [1], [5], "y"),
    ]
    assert Partners(prompts, 0).other_document(0) == 2
    assert {Partners(prompts, seed).other_document(2) for seed in range(20)} == {0, 1}
    assert {Partners(prompts, seed).other_document(3) for seed in range(40)} == {0, 1, 2}


def test_one_document_alone_has_no_partner_and_says_what_to_do(tiny):
    prompts = [tiny.prompt("a", [1], [2]), tiny.prompt("a", [1, 1], [3])]
    with pytest.raises(
        UserError, match="other_document needs held-out prompts of two documents; raise"
    ):
        Partners(prompts, 0).other_document(0)


def test_another_continuation_differs_from_ones_own_or_there_is_none(tiny):
    prompts = [tiny.prompt("a", [1], [2]), tiny.prompt("b", [1], [2]), tiny.prompt("c", [1], [3])]
    assert {Partners(prompts, seed).other_continuation(0) for seed in range(20)} == {2}
    assert Partners(prompts[:2], 0).other_continuation(0) is None


def lineup(tiny, prompts, thoughts, procedure):
    partners = Partners(prompts, procedure.seed)
    ids = [[np.array(thought, dtype=int) for thought in of_prompt] for of_prompt in thoughts]
    return Lineup(
        prompts,
        ids,
        partners,
        tiny.markers,
        procedure.neutral_ids,
        procedure.controls,
        procedure.seed,
    )


def test_the_branches_of_a_prompt_by_hand(tiny, procedure):
    prompts = [tiny.prompt("a", [1, 1, 1], [2, 3]), tiny.prompt("b", [4, 4], [5, 0])]
    found = lineup(tiny, prompts, [[[0, 0, 4], []], [[3], [2, 2]]], procedure).branches(0)
    spelled = {name: branch.ids.tolist() for name, branch in found.items() if name[0] != "shuffled"}
    o, c = tiny.markers.ids
    assert spelled == {
        ("empty", ANY_SAMPLE): [o, c, 2, 3],
        ("null", ANY_SAMPLE): [2, 3],
        ("wrong_no_think", ANY_SAMPLE): [5, 0],
        ("own", 0): [o, 0, 0, 4, c, 2, 3],
        ("filler", 0): [o, 5, 5, 5, c, 2, 3],
        ("context_copy", 0): [o, 1, 1, 1, c, 2, 3],
        ("other_document", 0): [o, 3, c, 2, 3],
        ("wrong_target", 0): [o, 0, 0, 4, c, 5, 0],
        ("own", 1): [o, c, 2, 3],
        ("filler", 1): [o, c, 2, 3],
        ("context_copy", 1): [o, c, 2, 3],
        ("other_document", 1): [o, 2, 2, c, 2, 3],
        ("wrong_target", 1): [o, c, 5, 0],
    }
    assert sorted(found["shuffled", 0].ids.tolist()) == sorted([o, 0, 0, 4, c, 2, 3])
    assert found["shuffled", 0].ids.tolist()[4:] == [c, 2, 3]
    assert {
        branch.score_start
        for name, branch in found.items()
        if name[0] in ("null", "wrong_no_think")
    } == {0}
    assert found["own", 0].score_start == 5
    assert {branch.cut for branch in found.values()} == {3}


def test_only_the_controls_that_were_asked_for_are_built(tiny, procedure):
    prompts = [tiny.prompt("a", [1], [2])]
    bare = lineup(tiny, prompts, [[[0]]], type(procedure)(tiny.markers, (5,), 1, (), 0))
    assert list(bare.branches(0)) == [("own", 0)]
