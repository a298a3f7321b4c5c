"""What a run has spent: cumulated by hand, and FLOPs from the one place that counts them."""

import pytest

from rlpt.compute import Spent, cumulative_costs, summed
from rlpt_data.strict import UserError

ROWS = [
    {"step": 1, "stage": "warmup", "tokens/train": 100.0, "time/step": 0.5},
    {"step": 2, "stage": "rl", "tokens/train": 40.0, "tokens/rollout": 7.0, "time/step": 2.0},
    {"step": 3, "stage": "rl", "tokens/train": 41.0, "tokens/rollout": 8.0, "time/step": 3.0},
]


def test_what_a_run_spent_is_cumulated_from_nothing():
    spent = summed(ROWS, {"warmup": 1e9, "rl": 3e9})
    assert list(spent) == [0, 1, 2, 3]
    assert spent[0] == Spent()
    assert spent[1] == Spent(1, 0.0, 100.0, 1e9, 0.5)
    assert spent[3] == Spent(3, 15.0, 181.0, 7e9, 5.5)
    assert spent[3].tokens == 196.0


def test_flops_that_were_not_counted_are_not_zero():
    spent = summed(ROWS, {"warmup": 1e9, "rl": None})
    assert [spent[step].flops for step in spent] == [0.0, 1e9, None, None]
    assert spent[3].seconds == pytest.approx(5.5)


def test_a_line_that_a_kill_cut_short_is_no_step_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "s", "tokens/train": 8.0}\n{"step": 2, "sta')
    assert cumulative_costs(tmp_path, flops=False)[1].trained_tokens == 8.0
    assert list(cumulative_costs(tmp_path, flops=False)) == [0, 1]
    path.write_text('{"step": 1, "sta\n{"step": 2, "stage": "s"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: damaged"):
        cumulative_costs(tmp_path, flops=False)


def test_a_count_that_is_null_counts_nothing() -> None:
    from rlpt.compute import summed

    rows = [
        {"step": 1, "stage": "a", "tokens/train": None, "time/step": None, "tokens/rollout": 3.0}
    ]
    assert summed(rows, {"a": 2.0})[1].tokens == 3.0
