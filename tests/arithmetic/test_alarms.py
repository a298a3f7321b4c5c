"""Numbers over the last steps by hand, and what they warn of and end."""

import math
from statistics import fmean, median

import pytest
from pydantic import ValidationError

from rlpt.alarms import ALARMS, MEMORY, WINDOW, of_evaluation, verdict, watched
from rlpt.limits import GuardsConfig

CFG = GuardsConfig()


def lines(count: int, stage: str = "rl", **values) -> list[dict]:
    """So many lines; a value may be a function of the place."""
    return [
        {"stage": stage} | {name: v(n) if callable(v) else v for name, v in values.items()}
        for n in range(count)
    ]


def judged(rows: list[dict], cfg: GuardsConfig = CFG) -> tuple[set[str], set[str]]:
    """Names of the metrics that warn at the last of the lines, and of those that end the run."""
    done: list[dict] = []
    for row in rows:
        done.append(row | watched(done[-MEMORY:], row))
    warnings, halts = verdict(done[-MEMORY - 1 :], cfg)
    return {name[6:] for name in warnings}, {name[6:] for name in halts}


def last(rows: list[dict]) -> dict[str, float]:
    return watched(rows[:-1], rows[-1])


def test_steps_that_were_skipped_are_counted_in_a_row_and_in_the_last_hundred() -> None:
    flags = [1.0, 0.0, 1.0, 1.0]
    found = last(lines(4, **{"update/skipped": lambda n: flags[n]}))
    assert found == {"watch/skipped_in_a_row": 2.0, "watch/skipped_share": 0.03}
    # The first of 101 is forgotten.
    old = last(lines(101, **{"update/skipped": lambda n: float(n == 0 or n > 98)}))
    assert old == {"watch/skipped_in_a_row": 2.0, "watch/skipped_share": 0.02}
    other = lines(3, "warmup", **{"update/skipped": 1.0}) + lines(1, **{"update/skipped": 0.0})
    assert last(other) == {"watch/skipped_in_a_row": 0.0, "watch/skipped_share": 0.0}


@pytest.mark.parametrize(("skipped", "ends"), [
    ({7, 8, 9}, set()),
    ({6, 7, 8, 9}, {"skipped_in_a_row"}),
    ({0, 2, 4, 6, 9}, set()),
    ({0, 2, 4, 6, 8, 9}, {"skipped_share"}),
    (set(range(10)), {"skipped_in_a_row", "skipped_share"}),
])  # fmt: skip
def test_more_than_three_in_a_row_or_five_in_a_hundred_end_a_run(skipped, ends) -> None:
    rows = lines(10, **{"update/skipped": lambda n: float(n in skipped)})
    assert judged(rows) == (set(), ends)


def test_a_limit_of_zero_ends_at_the_first_step() -> None:
    rows = lines(2, **{"update/skipped": lambda n: float(n)})
    assert judged(rows, GuardsConfig(nonfinite_in_a_row=0))[1] == {"skipped_in_a_row"}
    assert judged(rows, GuardsConfig(nonfinite_share=0.0))[1] == {"skipped_share"}
    assert judged(rows)[1] == set()


def test_a_gradient_norm_is_held_against_the_median_of_those_before() -> None:
    norms = [math.nan, 0.0, *range(1, 21), 63.0]
    rows = lines(len(norms), **{"loss/grad_norm": lambda n: norms[n]})
    assert last(rows)["watch/grad_norm"] == 63.0 / median(range(1, 21)) == 6.0
    # 19 norms are too few, and neither 0 nor what is not finite is one.
    assert "watch/grad_norm" not in last(rows[:-1])
    assert "watch/grad_norm" not in last([*rows, {"stage": "rl", "loss/grad_norm": 0.0}])
    assert "watch/grad_norm" not in last([*rows, {"stage": "rl", "loss/grad_norm": math.inf}])


def test_the_median_is_of_the_last_hundred_steps_of_the_stage() -> None:
    rows = lines(150, "warmup", **{"loss/grad_norm": 1e6})
    rows += lines(231, **{"loss/grad_norm": lambda n: 1.0 if n < 130 else 2.0})
    assert last(rows)["watch/grad_norm"] == 1.0


def test_five_norms_in_a_row_beyond_the_limit_end_a_run_and_four_do_not() -> None:
    rows = lines(40, **{"loss/grad_norm": lambda n: 1.0 if n < 30 else 1000.0})
    assert judged(rows[:34]) == ({"grad_norm"}, set())
    assert judged(rows[:35]) == ({"grad_norm"}, {"grad_norm"})
    rows[32]["loss/grad_norm"] = 99.0
    assert judged(rows[:35]) == ({"grad_norm"}, set())
    rows[34]["loss/grad_norm"] = 9.9
    assert judged(rows[:35]) == (set(), set())


def test_truncation_is_a_mean_over_fifty_steps() -> None:
    rows = lines(60, **{"thought/closer_rate": lambda n: 1.0 - n / 100})
    assert last(rows)["watch/truncated"] == pytest.approx(fmean(range(10, 60)) / 100)
    assert "watch/truncated" not in last(rows[: WINDOW - 1])


@pytest.mark.parametrize(("share", "steps", "warns", "ends"), [
    (0.16, 49, False, False),
    (0.16, 50, True, False),
    (0.16, 148, True, False),
    (0.16, 149, True, True),
    (0.09, 200, True, False),
    (0.04, 200, False, False),
])  # fmt: skip
def test_truncation_warns_after_fifty_steps_and_ends_a_run_after_a_hundred_more(
    share: float, steps: int, warns: bool, ends: bool
) -> None:
    rows = lines(steps, **{"thought/closer_rate": 1.0 - share})
    assert judged(rows) == ({"truncated"} if warns else set(), {"truncated"} if ends else set())


def test_truncation_that_falls_in_time_ends_no_run() -> None:
    """From 0.8 to nothing in 130 steps."""
    rows = lines(300, **{"thought/closer_rate": lambda n: min(1.0, 0.2 + 0.8 * n / 130)})
    assert all(judged(rows[:n])[1] == set() for n in (50, 100, 149, 160, 300))
    never = GuardsConfig(truncation_halt=1.0)
    rows = lines(200, **{"thought/closer_rate": 0.0})
    assert judged(rows, never) == ({"truncated"}, set())


def test_leaks_are_a_mean_over_fifty_steps_that_had_something_to_leak() -> None:
    rows = lines(80, **{"thought/leak_rate": lambda n: n / 100})
    assert last([*rows, {"stage": "rl"}])["watch/leak_rate"] == pytest.approx(0.545)
    assert judged(rows) == ({"leak_rate"}, set())
    assert judged(rows, GuardsConfig(leak_warn=0.545)) == (set(), set())


def lengthy(gain) -> list[dict]:
    """Thoughts above their group have 12 tokens, those below 4, all of them 10 in the mean."""
    names = {"thought/length_positive": 12.0, "thought/length_negative": 4.0}
    return lines(WINDOW, **names, **{"thought/length": 10.0, "gain/mean": gain})


def test_a_gap_between_lengths_counts_while_the_gain_does_not_rise() -> None:
    assert last(lengthy(0.1))["watch/length_gap"] == pytest.approx(0.8)
    assert judged(lengthy(0.1)) == ({"length_gap"}, set())
    assert last(lengthy(lambda n: -n / 100))["watch/length_gap"] == pytest.approx(0.8)
    # It rises from the older half to the newer one, although it fell at last.
    assert last(lengthy(lambda n: float(24 < n < 49)))["watch/length_gap"] == 0.0
    assert "watch/length_gap" not in last(lengthy(0.1)[1:])


def test_lengths_below_a_token_are_no_gap() -> None:
    rows = [row | {"thought/length": 0.02, "thought/length_positive": 0.03,
                   "thought/length_negative": 0.01} for row in lengthy(0.1)]  # fmt: skip
    assert last(rows)["watch/length_gap"] == pytest.approx(0.02)


def interval(mean: float, half: float | None = 0.01) -> dict:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "ci_low": low, "ci_high": high}


def evaluation(gain: float, half: float | None = 0.01) -> dict:
    gains = {"empty": -0.3, "filler": 0.05, "other_document": -0.1, "shuffled": 0.2}
    controls = {
        name: {"gain": interval(own), "own_minus_control": interval(gain - own, half)}
        for name, own in gains.items()
    }
    return {"gain_heldout": interval(gain, half), "controls": controls}


def test_the_best_control_of_a_verdict_is_held_against_the_gain() -> None:
    """filler, at 0.05; shuffled thoughts have the policy's own words."""
    assert of_evaluation(evaluation(0.2)) == pytest.approx(
        {"watch/control_gain": 0.05, "watch/control_margin": 0.2 - 0.05 - 0.01}
    )
    # No gain is claimed, or nothing known of it: there is nothing to explain away.
    for summary in (evaluation(0.005), evaluation(0.2, None)):
        assert of_evaluation(summary) == {"watch/control_gain": 0.05}
    assert of_evaluation({"gain_heldout": interval(0.2)}) == {}


def test_a_control_that_gains_as_much_is_a_warning() -> None:
    for gain, warns in ((0.2, set()), (0.055, {"control_margin"})):
        warnings, halts = verdict([of_evaluation(evaluation(gain))], CFG)
        assert {name[6:] for name in warnings} == warns
        assert halts == {}


def test_a_line_says_number_limit_and_remedy() -> None:
    rows = lines(100, **{"thought/closer_rate": 0.5})
    done = [row | {"watch/truncated": 0.5} for row in rows]
    line = verdict(done, CFG)[1]["watch/truncated"]
    assert line.startswith("watch/truncated = 0.5 exceeds guards.truncation_halt = 0.1; ")
    assert "thought.budget_tokens" in line
    assert "\n" not in line
    assert verdict(done[1:], CFG)[1] == {}


def test_every_limit_has_an_alarm_and_every_alarm_its_limit() -> None:
    named = [key for alarm in ALARMS for key in (alarm.warn, alarm.halt) if key is not None]
    assert sorted(named) == sorted(GuardsConfig.model_fields)


@pytest.mark.parametrize("name", ["grad_norm", "truncation"])
def test_a_warning_after_the_end_is_refused(name: str) -> None:
    values = {f"{name}_warn": 200.0, f"{name}_halt": 150.0}
    if name == "truncation":
        values = {f"{name}_warn": 0.5, f"{name}_halt": 0.2}
    with pytest.raises(ValidationError, match=f"{name}_warn = .* exceeds {name}_halt"):
        GuardsConfig(**values)
