"""Lines of JSON that a run leaves: damage, bombs and rows that are none are refused before anything is made of them."""

import json
import tracemalloc

import pytest
import zstandard

from rlpt.rollout.records import packed, supply_rows
from rlpt.rows import NUMBER, TEXT, TRUTH, fitting, journal_row, unzipped, zipped
from rlpt_data.strict import UserError

ROLLOUT = {
    "ids": [3, 4, 5], "action": [1, 1, 0], "logp": [-0.5, float("-inf"), 0.0], "version": [-1, 0, 7],
    "thought_len": 2, "finish": "budget",
}  # fmt: skip
GROUP = {"document": "ab", "cut": 9, "budget": None, "rollouts": [ROLLOUT]}
LOT = {"place": "kept", "position": 1, "uses": 0, "budget": 3, "cuts": [9], "groups": [GROUP]}
RATING = {"place": "rated", "position": -1, "of": "document", "name": "ab", "rating": [1, 0.5]}


def test_rows_come_back_as_they_were() -> None:
    assert supply_rows(packed([LOT, RATING]), "f") == [LOT, RATING]


def with_rollout(**changes: object) -> dict:
    return LOT | {"groups": [GROUP | {"rollouts": [ROLLOUT | changes]}]}


@pytest.mark.parametrize(
    "row",
    [
        5, [], {}, LOT | {"position": -1}, LOT | {"position": 2**60}, LOT | {"cuts": [1.5]},
        LOT | {"more": 1}, LOT | {"groups": [GROUP | {"rollouts": []}]}, RATING | {"rating": ["x"]},
        RATING | {"of": "cut"}, with_rollout(ids=[3, 4]), with_rollout(action=[1, 1]),
        with_rollout(logp=[0.0]), with_rollout(version=[0]), with_rollout(thought_len=3),
        with_rollout(thought_len=-1), with_rollout(ids=[3, 4, -1]), with_rollout(ids=[3, 4, 2**31]),
        with_rollout(action=[1, 1, 2]), with_rollout(finish="end"), with_rollout(version=[-2, 0, 0]),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_holds_something_else_is_damage(row: object) -> None:
    data = zipped(json.dumps(row).encode() + b"\n")
    with pytest.raises(UserError, match=r"f: damaged: .+; restore it"):
        supply_rows(data, "f")


def test_lists_without_end_are_damage() -> None:
    with pytest.raises(UserError, match="f: damaged: recursion limit"):
        supply_rows(zipped(b"[" * 5000 + b"\n"), "f")


def test_a_bomb_costs_its_limit_and_no_more() -> None:
    bomb = zstandard.compress(bytes(1 << 30))
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    with pytest.raises(ValueError, match="swell to more than 67108864"):
        unzipped(bomb)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 << 20


def test_rows_may_shrink_two_hundred_times() -> None:
    rows = b'{"a": 1}\n' * (9 << 20)
    assert unzipped(zipped(rows[: 1 << 26])) == rows[: 1 << 26]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"5", "no table"),
        (b"{", "EOF"),
        (b'{"stage": "a"}', "no step"),
        (b'{"step": true, "stage": "a"}', "no step"),
        (b'{"step": -1, "stage": "a"}', "no step"),
        (b'{"step": 1e3, "stage": "a"}', "no step"),
        (b'{"step": 9007199254740992, "stage": "a"}', "no step"),
        (b'{"step": 1}', "no stage"),
        (b'{"step": 1, "stage": 2}', "no stage"),
        (b'{"step": 1, "stage": "a", "summary": 2}', "no stage, or a summary"),
        (b'{"step": 1, "stage": "a", "x": "2"}', "x is no number"),
        (b'{"step": 1, "stage": "a", "x": true}', "x is no number"),
        (b'{"step": 1, "stage": "a", "x": 9007199254740992}', "x is no number"),
        (b'{"step": 1, "stage": "a", "x": [1]}', "x is no number"),
        (b'{"step": 1, "stage": "\\ud800"}', "hex escape"),
    ],
)
def test_a_line_of_a_journal_holds_a_step_a_stage_and_numbers(line: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        journal_row(line)


def test_numbers_of_a_journal_may_be_absent_or_none() -> None:
    row = {"step": 0, "stage": "a", "x": None, "y": 3, "z": 0.5, "summary": {"v": "w"}}
    assert journal_row(json.dumps(row).encode()) == row


SHAPE = {"a!": NUMBER, "b": TEXT, "c": {"x!": TRUTH}, "d": [NUMBER], "e": {"*": {"y!": NUMBER}}}


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (5, "it is no table"),
        ({}, "it has no a"),
        ({"a": None}, "it has no a"),
        ({"a": True}, "a is not a number"),
        ({"a": 2**53}, "a is not a number"),
        ({"a": 1, "b": 2}, "b is not text"),
        ({"a": 1, "c": {}}, "c has no x"),
        ({"a": 1, "c": {"x": 1}}, "x is not true or false"),
        ({"a": 1, "c": []}, "c is no table"),
        ({"a": 1, "d": 3}, "d is no list"),
        ({"a": 1, "d": [1, None]}, "d is not a number"),
        ({"a": 1, "e": {"any": {}}}, "any has no y"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_shape_is_named(value: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what}$"):
        fitting(value, SHAPE)


def test_what_a_shape_does_not_name_may_be_anything() -> None:
    value = {"a": 0.5, "b": None, "d": [1.0, float("nan")], "e": {"z": {"y": 1}}, "more": [object]}
    assert fitting(value, SHAPE) is value
