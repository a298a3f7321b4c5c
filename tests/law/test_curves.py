"""Points out of run folders, ladders and tables, and which of them a law sees."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlpt.law.curves import read
from rlpt.law.window import window
from rlpt_data.strict import UserError


def table(folder: Path, text: str) -> Path:
    (folder / "curve.csv").write_text(text)
    return folder / "curve.csv"


def test_evaluations_are_read_by_dotted_name_from_where_thinking_begins(thinking_run: Path) -> None:
    curve = read(thinking_run, "steps", "gain_heldout.mean", None)
    assert curve.compute_N.tolist() == [0, *range(20, 201, 20)]
    assert curve.value_N[[0, 3]] == pytest.approx([-0.1, 0.05])
    # Half of [-.0196, .0196] over 1.96.
    assert curve.sd_N == pytest.approx(np.full(11, 0.01), rel=1e-4)
    assert curve.note == "compute counted from step 100, where think begins"
    # An interval's own name is its mean.
    assert (
        read(thinking_run, "steps", "gain_heldout", None).value_N.tolist() == curve.value_N.tolist()
    )


@pytest.mark.parametrize(
    ("x", "spent"),
    [("steps", 40), ("tokens", 40 * 17), ("seconds", 20.0)],
    ids=["steps", "tokens", "seconds"],
)
def test_compute_is_what_was_spent_since_then(thinking_run: Path, x: str, spent: float) -> None:
    curve = read(thinking_run, x, "gain_heldout.mean", None)
    assert curve.compute_N[[0, 2]].tolist() == [0, spent]


def test_compute_may_be_counted_from_another_step(thinking_run: Path) -> None:
    curve = read(thinking_run, "tokens", "gain_heldout.mean", 0)
    assert curve.compute_N[[0, 5, 6]].tolist() == [0, 1000, 1000 + 20 * 17]
    assert read(thinking_run, "steps", "gain_heldout", 200).compute_N.tolist() == [
        0,
        20,
        40,
        60,
        80,
        100,
    ]


def test_any_metric_is_a_curve_its_rows_as_they_are_without_what_is_no_number(
    thinking_run: Path,
) -> None:
    curve = read(thinking_run, "steps", "reward/mean", None)
    assert curve.not_finite == 1
    assert len(curve.value_N) == 199
    assert (curve.compute_N[0], curve.value_N[0]) == (1, 1.01)
    assert 50 not in curve.compute_N
    assert curve.sd_N is None


def test_a_ladder_of_checkpoints_is_a_curve_over_its_training_or_its_thinking(
    tmp_path: Path,
) -> None:
    rungs = [
        {
            "name": f"step {step}",
            "training": {"steps": step, "tokens": 10 * step, "flops": None},
            "thinking": {"flops": 7.0 * step},
            "gain_heldout": {"mean": step / 100, "ci_low": None, "ci_high": None},
        }
        for step in (0, 20, 10)
    ]
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({"rungs": rungs}))
    curve = read(path, "tokens", "gain_heldout.mean", None)
    assert (curve.compute_N.tolist(), curve.value_N.tolist()) == ([0, 100, 200], [0, 0.1, 0.2])
    assert read(path, "thinking.flops", "gain_heldout", None).compute_N.tolist() == [0, 70, 140]
    assert read(path, "flops", "gain_heldout", None).not_finite == 3


def test_a_table_is_read_by_its_columns_in_the_order_of_compute(tmp_path: Path) -> None:
    text = "hours,score,ci_low,ci_high\n4,.5,.304,.696\n1,.2,.004,.396\n2,,0,1\n3,nan,0,1\n"
    curve = read(table(tmp_path, text), "hours", "score", None)
    assert (curve.compute_N.tolist(), curve.value_N.tolist(), curve.not_finite) == (
        [1, 4],
        [0.2, 0.5],
        2,
    )
    assert curve.sd_N == pytest.approx([0.1, 0.1], rel=1e-4)


@pytest.mark.parametrize(
    ("text", "x", "y", "said"),
    [
        ("a,b\n1,2\n", "hours", "b", "--x hours: no such column; columns: a, b"),
        ("a,b\n1,2\n", "a", "score", "--y score: no such column; columns: a, b"),
        ("a,b\n1,two\n", "a", "b", "line 2: 'two' is not a number"),
        ("a,b\n-1,2\n", "a", "b", "compute is never negative"),
        ("", "a", "b", "columns: none"),
    ],
    ids=["no x", "no y", "a word", "negative", "empty"],
)
def test_a_table_that_cannot_be_read_is_one_line(
    tmp_path: Path, text: str, x: str, y: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        read(table(tmp_path, text), x, y, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ("steps", "gain_heldot.mean", "nearest: gain_heldout.mean"),
        ("steps", "reward/maen", "nearest: reward/mean"),
        ("hours", "gain_heldout", "steps, tokens, flops or seconds"),
    ],
)
def test_a_metric_or_axis_that_is_not_there_names_the_nearest(
    thinking_run: Path, x: str, y: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read(thinking_run, x, y, None)


def test_a_table_of_other_characters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(b"hours,rate\n1,\xb5\n")
    with pytest.raises(UserError, match=r"latin\.csv: no table in UTF-8: .* convert it"):
        read(path, "hours", "rate", None)


def test_accuracy_on_questions_has_its_interval(tmp_path: Path, known) -> None:
    rows = [{"step": step, "stage": "think", "reward/mean": 0.5} for step in (1, 2)]
    run = known.write_run(tmp_path / "asked", [], rows)
    ends = {"rlvr/accuracy_ci_low": 0.4, "rlvr/accuracy_ci_high": 0.6}
    lines = [{"step": step, "stage": "think", "rlvr/accuracy": 0.5, **ends} for step in (0, 2)]
    (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read(run, "steps", "rlvr/accuracy", None)
    np.testing.assert_allclose(curve.sd_N, 0.1 / 1.959963984540054)
    with pytest.raises(UserError, match="no rlvr/accuracy from step 3 on; lower --from-step"):
        read(run, "steps", "rlvr/accuracy", 3)


def test_what_is_no_run_or_is_damaged_is_one_line(
    known, tmp_path: Path, thinking_run: Path
) -> None:
    with pytest.raises(UserError, match="no such run"):
        read(tmp_path / "absent", "steps", "gain_heldout", None)
    with pytest.raises(UserError, match="no run here"):
        read(tmp_path, "steps", "gain_heldout", None)
    rows = [{"step": step, "stage": "think", "reward/mean": 0.5} for step in (1, 2)]
    run = known.write_run(tmp_path / "unevaluated", [], rows)
    with pytest.raises(UserError, match="it has no evaluations; valid: reward/mean"):
        read(run, "steps", "bits_per_byte", None)
    with pytest.raises(UserError, match="it has no tokens"):
        read(run, "tokens", "reward/mean", None)
    with (thinking_run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 320, "summ')
    with pytest.raises(UserError, match=r"evaluations\.jsonl, line 17: damaged"):
        read(thinking_run, "steps", "gain_heldout", None)


# ---- which points a law sees ---------------------------------------------------------------------


def curve_of(folder: Path, compute, value):
    rows = "".join(f"{x},{y}\n" for x, y in zip(compute, value, strict=True))
    return read(table(folder, "x,y\n" + rows), "x", "y", None)


def test_the_first_point_is_the_start_and_the_first_twentieth_is_early(tmp_path: Path) -> None:
    curve = curve_of(tmp_path, range(0, 101), np.linspace(0, 1, 101))
    seen = window(curve, None, "measured", weighted=False)
    assert (seen.start, seen.skip_before) == (0.0, 5.0)
    assert seen.points.compute_N.tolist() == list(range(5, 101))
    assert seen.early.compute_N.tolist() == [1, 2, 3, 4]
    assert window(curve, 50, "measured", weighted=False).points.compute_N.min() == 50


def test_a_first_point_above_0_is_the_start_unless_one_is_given(tmp_path: Path) -> None:
    curve = curve_of(tmp_path, range(10, 110, 10), np.linspace(0.1, 1, 10))
    measured = window(curve, 0, "measured", weighted=False)
    assert (measured.start, len(measured.points)) == (0.1, 9)
    given = window(curve, 0, 0.05, weighted=False)
    assert (given.start, len(given.points)) == (0.05, 10)
    # The power law has no start, so every point is one to fit.
    assert len(window(curve, 0, None, weighted=False).points) == 10


@pytest.mark.parametrize(
    ("values", "skip", "said"),
    [
        ([0.5], None, "0 of 1 points to fit"),
        ([0.1, 0.2, 0.3, 0.4], None, "3 of 4 points to fit"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2.5, "3 of 6 points to fit"),
        ([0.5] * 9, None, "all 9 points are 0.5"),
        ([math.nan] * 3, None, r"no point that is a number \(3 are not\)"),
    ],
    ids=["one", "few", "few left", "equal", "nan"],
)
def test_too_little_to_fit_is_one_line(
    tmp_path: Path, values: list[float], skip: float | None, said: str
) -> None:
    curve = curve_of(tmp_path, range(len(values)), values)
    with pytest.raises(UserError, match=said) as error:
        window(curve, skip, "measured", weighted=False)
    assert "\n" not in str(error.value)


def test_intervals_that_are_not_there_are_no_noise(tmp_path: Path, thinking_run: Path) -> None:
    with pytest.raises(UserError, match="--noise residuals"):
        window(curve_of(tmp_path, range(9), range(9)), None, "measured", weighted=True)
    seen = window(
        read(thinking_run, "steps", "gain_heldout", None), None, "measured", weighted=True
    )
    assert seen.points.sd_N == pytest.approx(np.full(10, 0.01), rel=1e-4)
