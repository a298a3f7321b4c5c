"""Tokens, numbers and curves: what is drawn is what was measured."""

import math
import re
from dataclasses import replace

import pytest

from rlpt.report import charts, tokens, words, write
from rlpt.report.run import read


def test_thoughts_are_ordered_by_gain_and_the_middle_is_counted(group):
    card = tokens.card(group(1), scale=1.0)
    assert [shown.thought for shown in card.shown] == [f"plain thought {g}" for g in (1, 0, -4, -5)]
    assert card.left_out == 3
    assert card.no_think == pytest.approx(-2.0)


def test_a_token_is_coloured_by_its_own_gain(group):
    first, second, third = tokens.card(group(1), scale=1.0).shown[0].tokens
    assert (first.gain, first.strength, first.helps) == (1.0, 1.0, True)
    assert (second.gain, second.strength) == (0.0, 0.0)
    assert (third.gain, third.helps) == (-0.5, False)
    assert third.strength == pytest.approx(math.sqrt(0.5), abs=0.01)
    assert first.note == "p 0.368 → 1.000 (+1.000 nats)"


def test_noise_does_not_get_full_colour(group):
    quiet = group(1)
    quiet["rollouts"] = [{**quiet["rollouts"][0], "logp": [-1.01, -2.0, -3.0]}]
    assert tokens.scale_of([quiet]) == tokens.SMALLEST_SCALE
    assert tokens.scale_of([group(1)]) > 0.5


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
    thinned = charts._thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0] == (4.5, 0.5)
    assert charts._thin(points[:50], 100) == points[:50]


def test_a_metric_that_is_never_finite_is_left_out_of_curves_and_table(tmp_path, make_run):
    assert charts.finite([{"step": 1, "bad": math.nan}, {"step": 2, "bad": None}], "bad") == []
    page = write(make_run(tmp_path / "run")).read_text()
    named = re.findall(r'<th class="mono">([^<]+)</th>', page)
    assert "reward/mean" in named
    assert "bad" not in named


def test_mean_and_largest_mismatch_share_axes_of_powers_of_ten():
    """A difference of exactly 0 has no place there; ticks are plain figures."""
    rows = [
        {"step": s, "mismatch/abs_log_ratio": 0.0 if s == 3 else 1e-6 * s, "mismatch/ess": 1.0}
        | {"mismatch/max_abs_log_ratio": 10.0 ** -(s % 3)}
        for s in range(1, 20)
    ]
    drawn = {re.findall(r'aria-label="([^"]+)"', svg)[0]: svg for svg in charts.curves(rows)}
    assert list(drawn) == ["Engine against trainer", "Effective sample"]
    engine = drawn["Engine against trainer"]
    assert ">largest<" in engine
    assert ">mean<" in engine
    assert "newest" not in engine
    assert ">0.01<" in engine
    assert "mathdefault" not in engine
    (lines,) = [re.findall(r'd="([^"]+)"[^>]*stroke: var\(--c1\)', engine)]
    assert max(line.count("L") for line in lines) == len(rows) - 2
    nothing = charts.curves([{"step": 1, "mismatch/abs_log_ratio": 0.0}])
    assert len(nothing) == 1
