"""The page's and the terminal's alarms say of the run's own lines what the trainer says of them."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlpt.alarms import ALARMS
from rlpt.report import guarded, write
from rlpt.report.run import Run
from rlpt.watch import numbers
from rlpt.watch.following import Known
from rlpt.watch.frame import frame

CONFIG = {"guards": {"truncation_halt": 0.5, "grad_norm_halt": float("inf")}}


def line(step: int, **values) -> dict:
    found = {f"watch/{name}": value for name, value in values.items()}
    return {"step": step, "stage": "rl", "update/skipped": 0.0, "watch/warnings": 0.0, **found}


LINES = [
    line(7, truncated=0.04, grad_norm=1.0),
    line(8, truncated=0.06, grad_norm=11.0) | {"update/skipped": 1.0},
    line(9, truncated=0.6, skipped_share=0.01) | {"watch/warnings": 1.0},
]


def evaluation(step: int, gain: float) -> dict:
    def interval(mean: float) -> dict:
        return {"mean": mean, "ci_low": mean - 0.01, "ci_high": mean + 0.01}

    control = {"gain": interval(0.1), "own_minus_control": interval(gain - 0.1)}
    summary = {"gain_heldout": interval(gain), "controls": {"filler": control}}
    return {"step": step, "stage": "rl", "summary": summary}


def run_of(metrics=(), evaluations=(), config=CONFIG) -> Run:
    empty: dict = {}
    return Run(
        Path("own"), "own", config, empty, empty, list(metrics), list(evaluations), [], empty, []
    )  # fmt: skip


def shown(watched: list[guarded.Watch]) -> dict[str, tuple[bool, str] | None]:
    return {each.title: each.found[0] for each in watched}


def test_a_table_says_where_every_number_left_its_first_limit() -> None:
    found = shown(guarded.watches([run_of(LINES, [evaluation(5, 0.5), evaluation(9, 0.105)])]))
    assert found == {
        "Skipped steps": (False, "none of 1 steps"),
        "Gradient norm": (True, "1 of 2 steps, first at 8"),
        "Thoughts that the budget ended": (True, "2 of 3 steps, first at 8"),
        "Own thought over the best control": (True, "1 of 2 evaluations, first at 9"),
    }


def test_limits_are_those_of_the_run_and_an_infinite_one_is_none() -> None:
    limits = {each.title: each.limits for each in guarded.watches([run_of(LINES)])}
    assert limits["Thoughts that the budget ended"] == "warns above 0.05, ends the run above 0.5"
    assert limits["Gradient norm"] == "warns above 10"


def test_the_alarm_that_ended_a_run_says_so() -> None:
    rows = [line(n, truncated=0.6) for n in range(1, 121)]
    found = shown(guarded.watches([run_of(rows)]))["Thoughts that the budget ended"]
    assert found == (True, "120 of 120 steps, first at 1; it ended the run")
    rows[-3]["watch/truncated"] = 0.3
    found = shown(guarded.watches([run_of(rows)]))["Thoughts that the budget ended"]
    assert found == (True, "120 of 120 steps, first at 1")


def test_of_many_steps_the_worst_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(guarded, "svg", lambda figure, name, title: drawn.append(figure) or title)
    rows = [line(n, grad_norm=50.0 if n == 700 else 1.0) for n in range(1, 1001)]
    guarded.charts([run_of(rows)])
    steps, values = drawn[0].axes[0].lines[0].get_data()
    assert (len(steps), max(values)) == (200, 50.0)
    assert steps[list(values).index(50.0)] == 700


def test_a_run_without_the_numbers_or_the_limits_is_not_judged() -> None:
    assert guarded.watches([run_of([{"step": 1}])]) == []
    assert guarded.watches([run_of(LINES, config={})]) == []
    assert guarded.charts([run_of([{"step": 1}])]) == []


def test_skipped_steps_are_named() -> None:
    assert guarded.skipped(run_of(LINES)) == (
        "nothing was trained on at step 8: a reward, a loss or the gradient was not finite"
    )
    many = [line(n) | {"update/skipped": 1.0} for n in range(1, 9)]
    assert "at step 1, 2, 3, 4, 5, 6 and 2 more:" in (guarded.skipped(run_of(many)) or "")
    assert guarded.skipped(run_of(LINES[:1])) is None


def test_every_alarm_has_a_title() -> None:
    assert list(guarded.TITLES) == [alarm.metric for alarm in ALARMS]


def test_charts_are_of_what_has_a_course(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(
        guarded, "svg", lambda figure, name, title: drawn.setdefault(title, figure) and title
    )
    assert guarded.charts([run_of(LINES)]) == list(drawn)
    assert list(drawn) == ["Skipped steps", "Gradient norm", "Thoughts that the budget ended"]
    values, warn, halt = (
        each.get_ydata() for each in drawn["Thoughts that the budget ended"].axes[0].lines
    )
    assert list(values) == [0.04, 0.06, 0.6]
    assert (set(warn), set(halt)) == ({0.05}, {0.5})


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_the_alarms(tmp_path, make_run) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"guards": {"truncation_halt": 0.5}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    text = re.sub(r"<[^>]+>|\s+", " ", write([folder]).read_text())
    assert "nothing was trained on at step 8" in text
    assert re.search(r"Thoughts that the budget ended +share of 50 steps .{0,80}2 of 3 steps", text)


def test_the_terminal_says_the_last_steps_alarms() -> None:
    known = Known("x", CONFIG, LINES)
    file = io.StringIO()
    Console(file=file, width=160).print(frame(known))
    text = re.sub(r"[\s│]+", " ", file.getvalue())
    assert "▲ 1 of 3 steps with a warning, 1 skipped" in text
    assert "watch/truncated = 0.6 exceeds guards.truncation_warn = 0.05" in text
    (found,) = numbers(known)["alarms"]
    assert found.startswith("watch/truncated = 0.6 exceeds")
    assert numbers(Known("x", CONFIG, LINES[:1]))["alarms"] == []
    assert numbers(Known("x", {}, LINES))["alarms"] == []
