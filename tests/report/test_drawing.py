"""Tokens, numbers and curves: what is drawn is what was measured."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlpt.guards import ROUNDING
from rlpt.report import clock, curves, drawing, judged, signs, words, write
from rlpt.report.readings import time_parts
from rlpt.report.run import Run, read


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "+0.123"),
        (-0.1234, "\N{MINUS SIGN}0.123"),
        (None, "\N{EN DASH}"),
        (math.nan, "\N{EN DASH}"),
        (0.0, "+0.000"),
    ],
)
def test_differences_always_have_their_sign(value, text):
    assert words.signed(value) == text


@pytest.mark.parametrize(("parameters", "tiny"), [(4_200_000, True), (600_000_000, False)])
def test_only_a_tiny_policy_is_told_what_a_tiny_policy_cannot_do(
    tmp_path, make_run, parameters, tiny
):
    run = read(make_run(tmp_path / "run"))
    told = words.expectation(replace(run, summary=run.summary | {"parameters": parameters}))
    assert ("On ordinary text a tiny policy" in told[0]) is tiny
    assert "not evidence of reasoning" in told[1]


@pytest.mark.parametrize(("empty_rate", "said"), [(0.97, True), (0.5, False), (0.02, False)])
def test_a_policy_that_stopped_thinking_is_said_to_have(tmp_path, make_run, empty_rate, said):
    run = read(make_run(tmp_path / "run"))
    summary = run.evaluations[-1]["summary"]
    thought = summary.get("thought", {}) | {"empty_rate": empty_rate, "mean_len": 0.04}
    last = run.evaluations[-1] | {"summary": summary | {"thought": thought}}
    run = replace(
        run,
        summary=run.summary | {"verdict": "harmful"},
        evaluations=[*run.evaluations[:-1], last],
    )
    told = " ".join(words.expectation(run))
    assert (
        "stopped thinking: 97% of its last held-out thoughts are empty (0.0 tokens" in told
    ) is said


def test_an_interval_without_bounds_says_so():
    assert words.interval({"mean": 0.5, "ci_low": None, "ci_high": None}) == "+0.500 (no interval)"
    assert words.interval(None) == "\N{EN DASH}"


def test_long_curves_are_thinned_to_means_of_neighbours():
    points = [(step, float(step % 2)) for step in range(1000)]
    thinned = drawing.thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0] == (4.5, 0.5)
    assert drawing.thin(points[:50], 100) == points[:50]


@pytest.mark.usefixtures("undrawn")
def test_a_metric_that_is_never_finite_is_left_out_of_curves_and_table(tmp_path, make_run):
    assert drawing.finite([{"step": 1, "bad": math.nan}, {"step": 2, "bad": None}], "bad") == []
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "bad": NaN}\n')
    page = write([folder]).read_text()
    named = re.findall(r'<th class="mono">([^<]+)</th>', page)
    assert "reward/mean" in named
    assert "bad" not in named


def of_rows(rows, name="run", config=None):
    return Run(Path("."), name, config or {}, {}, {}, rows, [], [], {})


def titles(drawings):
    return {re.findall(r'aria-label="([^"]+)"', svg)[0]: svg for svg in drawings}


def test_mean_and_largest_mismatch_share_axes_of_powers_of_ten():
    """A difference of exactly 0 has no place there; ticks are plain figures."""
    rows = [
        {"step": s, "mismatch/abs_log_ratio": 0.0 if s == 3 else 1e-6 * s, "mismatch/ess": 1.0}
        | {"mismatch/max_abs_log_ratio": 10.0 ** -(s % 3)}
        for s in range(1, 20)
    ]
    drawn = titles(judged.mismatch([of_rows(rows)]))
    assert list(drawn) == ["Effective sample", "Engine against trainer"]
    engine = drawn["Engine against trainer"]
    assert ">largest<" in engine
    assert ">mean<" in engine
    assert "newest" not in engine
    assert ">0.01<" in engine
    assert "mathdefault" not in engine
    (lines,) = [re.findall(r'd="([^"]+)"[^>]*stroke: var\(--c1\)', engine)]
    assert max(line.count("L") for line in lines) == len(rows) - 2
    nothing = curves.curves(
        [of_rows([{"step": 1, "mismatch/abs_log_ratio": 0.0}])], [judged.ENGINE]
    )
    assert len(nothing) == 1


MISMATCH = {"mismatch/ess": 0.9, "mismatch/rows": 400.0, "mismatch/current_share": 1.0} | {
    f"mismatch/current_{name}": 1e-3 for name in ("k1", "rms_log_ratio", "exp_abs_log_ratio")
}


def limits(runs, metric, level):
    """Where the drawn limit lies, step by step."""
    run, judge = runs[0], judged.shared_limits(runs)
    found = []
    for row in run.metrics:
        bounds = judged._bounds(row, judge, level, run.config)
        found += [limit for guard, limit in bounds if guard.metric == metric]
    return found


def test_limits_are_those_the_trainer_judges_by():
    config = {"mismatch": {"warn": {"ess": 0.4}}, "policy": {"compute_dtype": "bfloat16"}}
    runs = [of_rows([{"step": 1, **MISMATCH}], config=config)]
    assert limits(runs, "ess", "warn") == [0.4]
    assert limits(runs, "ess", "halt") == [0.1]
    assert limits(runs, "current_rms_log_ratio", "warn") == [ROUNDING["bfloat16"]]
    # 0.003 and four standard errors of 400 tokens.
    assert limits(runs, "current_k1", "warn") == [pytest.approx(0.003 + 4 * 1e-3 / 20)]
    few = [{"step": 1, **MISMATCH, "mismatch/rows": 31.0}]
    assert limits([of_rows(few, config=config)], "current_k1", "warn") == []
    alone = [{"step": 1, "mismatch/ess": 0.9}]
    drawn = titles(judged.mismatch([of_rows(alone, config=config)]))
    assert ">warn<" in drawn["Effective sample"]
    assert ">halt<" in drawn["Effective sample"]


def test_limits_are_not_drawn_where_runs_do_not_share_them():
    rows = [{"step": 1, "mismatch/ess": 0.9}]
    own = [of_rows(rows, config={"mismatch": {"warn": {"ess": ess}}}) for ess in (0.4, 0.5)]
    assert judged.shared_limits(own) is None
    assert ">warn<" not in "".join(judged.mismatch(own[:2]))
    assert judged.shared_limits([of_rows(rows)]) is None


def test_steps_with_a_warning_are_counted():
    rows = [{"step": s, "mismatch/warnings": float(s % 3 == 0)} for s in range(1, 8)]
    assert judged.alarms(of_rows(rows)) == (2, 7)
    assert judged.alarms(of_rows([{"step": 1}])) is None


def test_what_no_clock_took_is_the_rest_of_a_step():
    row = {"step": 1, "time/step": 10.0, "time/generate": 4.0, "time/train": 5.0, "time/wait": 3.9}
    assert time_parts(row) == {"generate": 4.0, "score": 0.0, "train": 5.0, "rest": 1.0}
    assert time_parts({"step": 1, "time/train": 5.0}) is None
    # Clocks overlap by a rounding: never below 0.
    assert time_parts(row | {"time/step": 8.9})["rest"] == 0.0
    totals = clock.time_totals(of_rows([row, row | {"time/step": math.nan}, row]))
    assert totals == {"generate": 8.0, "score": 0.0, "train": 10.0, "rest": 2.0}
    assert clock.step_time(of_rows([{"step": 1}])) is None


def test_one_slow_step_does_not_press_the_others_flat():
    assert clock._ceiling([1.0] * 99 + [50.0]) == pytest.approx(1.3 * 1.5)
    assert clock._ceiling([1.0, 1.2]) == pytest.approx(1.3 * 1.2)


def test_lengths_are_split_by_the_sign_of_the_advantage():
    """ids are thought and closer; an advantage of 0 teaches nothing and is on no side."""
    rollouts = [
        {"ids": [1] * 4, "advantage": 0.5},
        {"ids": [1] * 6, "advantage": 0.1},
        {"ids": [1] * 4, "advantage": -0.6},
        {"ids": [1] * 99, "advantage": 0.0},
        {"ids": [1] * 9, "prediction": "x", "advantage": 1.0},
        {"ids": [1] * 9, "prediction": "x", "thought_tokens": 7, "advantage": -1.0},
    ]
    assert signs.lengths_by_sign([{"step": 3, "rollouts": rollouts}]) == [(3, 4.0, 5.0)]


def test_signs_are_the_two_ends_and_a_dash_where_a_run_has_none(tmp_path, make_run):
    whole, bare = read(make_run(tmp_path / "run")), of_rows([{"step": 1}])
    found = {sign.title: sign.ends for sign in signs.signs([whole, bare])}
    # Rewards are step / 10 over 40 steps: means of the first and the last four.
    assert found["Reward"] == [("0.250", "3.850"), None]
    assert found["Thoughts that name the next token"] == [("0.200", "0.200"), None]
    assert "p(opener | context)" not in found


def test_rates_that_the_trainer_logs_get_a_curve():
    rows = [{"step": s, "thought/leak_rate": 0.1, "loss/x": 1.0} for s in (1, 2)]
    assert list(titles(signs.charts([of_rows(rows)]))) == ["thought/leak_rate"]


def test_runs_differ_in_colour_and_in_dash():
    styles = [drawing.line_style(index) for index in range(12)]
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 12
