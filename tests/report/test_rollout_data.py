"""What the page carries of the rollouts: all of them, rounded for the eye, text as it is."""

import base64
import gzip
import json
import math
from dataclasses import replace

import pytest
import zstandard

from rlpt.report import rollouts
from rlpt.report.run import read


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_every_group_of_every_dump_of_every_run_is_there(tmp_path, make_run):
    runs = [read(make_run(tmp_path / name), name) for name in ("one", "two")]
    found = unpacked(rollouts.embedded(runs).text)
    assert found["runs"] == ["one", "two"]
    assert [(g["run"], g["step"]) for g in found["groups"]] == [(0, 10), (0, 40), (1, 10), (1, 40)]
    assert all(len(g["thoughts"]) == 7 for g in found["groups"])


def test_gains_of_tokens_are_after_minus_before_and_the_best_thought_is_first(group):
    found = rollouts.group(0, group(1))
    assert [thought["text"] for thought in found["thoughts"]] == [
        f"plain thought {g}" for g in range(1, -6, -1)
    ]
    # logp -1 + 1, -2, -3.5 after the thought; -1, -2, -3 without.
    assert found["thoughts"][0]["gains"] == [1.0, 0.0, -0.5]
    assert found["without"] == [-1.0, -2.0, -3.0]


def test_what_no_gain_orders_the_reward_does(group):
    row = group(1) | {"no_think_logp": None}
    row["rollouts"] = [
        r | {"logp": None, "gain": None, "reward": g} for g, r in enumerate(row["rollouts"])
    ]
    found = rollouts.group(0, row)
    assert [thought["reward"] for thought in found["thoughts"]] == [6, 5, 4, 3, 2, 1, 0]
    assert {thought["gains"] for thought in found["thoughts"]} == {None}
    assert rollouts.scale_of([found]) == rollouts.SMALLEST_SCALE


def test_noise_does_not_get_full_colour(group):
    quiet = group(1)
    quiet["rollouts"] = [{**quiet["rollouts"][0], "logp": [-1.01, -2.0, -3.0]}]
    assert rollouts.scale_of([rollouts.group(0, quiet)]) == rollouts.SMALLEST_SCALE
    # The 19th of 21 sizes: 0 eight times, 0.5 seven times, 1, 1, 2, then 3.
    assert rollouts.scale_of([rollouts.group(0, group(1))]) == 3.0


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (0.123456, 0.1235),
        (7.00793e-12, 7.01e-12),
        (0.0, 0.0),
        (math.nan, None),
        (math.inf, None),
        (None, None),
    ],
    ids=["decimals", "tiny", "zero", "nan", "inf", "none"],
)
def test_numbers_are_rounded_for_the_eye_and_tiny_ones_keep_their_digits(value, kept):
    assert rollouts._short(value) == kept


@pytest.mark.parametrize(
    ("rollout", "length"),
    [
        ({"ids": [5, 6, 7]}, 2),
        ({"ids": [7], "prediction": ""}, 0),
        ({"ids": [5, 7, 8], "prediction": "x"}, None),
        ({"ids": [5, 7, 8], "prediction": "x", "thought_tokens": 1}, 1),
        ({}, None),
    ],
)
def test_a_thought_is_as_long_as_the_dump_can_tell(rollout, length):
    assert rollouts.thought_tokens(rollout) == length


def test_text_of_the_web_survives_but_for_what_turns_and_hides_it(group):
    text = "</script><b>\u202e\u00e4\u4e2d\x00"
    found = rollouts.group(0, group(1, text))
    assert found["context"] == "</script><b>\\u202e\u00e4\u4e2d\\u0000" * 3


def test_equal_runs_make_equal_pages(tmp_path, make_run):
    run = read(make_run(tmp_path / "run"))
    assert rollouts.embedded([run]) == rollouts.embedded([run])


def test_a_run_without_dumps_carries_nothing(tmp_path, make_run):
    run = replace(read(make_run(tmp_path / "run")), rollouts=[])
    assert rollouts.embedded([run]).text == ""


def test_all_dumps_are_read_in_the_order_of_their_steps(tmp_path, make_run, group):
    folder = make_run(tmp_path / "run")
    for step in (20, 30):
        data = zstandard.compress((json.dumps(group(step)) + "\n").encode())
        (folder / "rollouts" / f"step_{step:06d}.jsonl.zst").write_bytes(data)
    assert [row["step"] for row in read(folder).rollouts] == [10, 20, 30, 40]
