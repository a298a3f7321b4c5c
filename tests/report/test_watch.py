"""The terminal view says what the files say: as they grow, as a resume cuts them back, and before and after a run."""

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rlpt.cli import main
from rlpt.report import write
from rlpt.report.run import metrics_row, read_object
from rlpt.report.shapes import CONFIG as CONFIG_SHAPE
from rlpt.rows import NUMBER, fitting
from rlpt.watch import numbers
from rlpt.watch.following import Follower, Known, Watched
from rlpt.watch.frame import BLOCKS, alarms, frame, sparkline
from rlpt_data.strict import UserError

CONFIG = {
    "stage": [{"name": "warmup", "steps": 20}, {"name": "rl", "steps": 50}],
    "mismatch": {"warn": {"ess": 0.5}, "halt": {"ess": 0.2}},
}


def drawn(known, width=120):
    """The picture as plain text."""
    file = io.StringIO()
    Console(file=file, width=width).print(frame(known))
    return file.getvalue()


def lines(*steps):
    return "".join(json.dumps({"step": step, "stage": "rl"}) + "\n" for step in steps)


def steps(follower):
    return [row["step"] for row in follower.poll()]


def test_a_journal_is_followed_as_it_grows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    path.write_text(lines(1, 2))
    assert steps(follower) == [1, 2]
    # A line without its end is still being written.
    with path.open("a") as file:
        file.write('{"step": 3')
    assert steps(follower) == [1, 2]
    with path.open("a") as file:
        file.write(', "stage": "rl"}\n')
    assert steps(follower) == [1, 2, 3]
    assert follower.damaged == 0


def test_a_resume_cuts_the_journal_back_and_grows_it_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3))
    follower = Follower(path)
    assert steps(follower) == [1, 2, 3]
    path.write_text(lines(1))
    assert steps(follower) == [1]
    # Cut back and as long as before when it is looked at again.
    path.write_text(lines(1, 2, 3))
    assert steps(follower) == [1, 2, 3]
    path.write_text(lines(1, 7, 8))
    assert steps(follower) == [1, 7, 8]
    path.unlink()
    assert follower.poll() == []


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1) + '{"step": 2\n3\n' + lines(4))
    follower = Follower(path)
    assert steps(follower) == [1, 4]
    assert follower.damaged == 2


def test_steps_and_time_left_are_those_of_the_stage_in_hand():
    rows = [{"step": s, "stage": "warmup", "time/step": 9.0} for s in range(1, 21)]
    rows += [{"step": s, "stage": "rl", "time/step": 2.0} for s in range(21, 31)]
    known = Known("x", CONFIG, rows)
    assert (known.state, known.stage_step, known.stage["steps"]) == ("running", 10, 50)
    # 40 steps of 2 seconds: the pace of the stage before does not count.
    assert known.seconds_left == 80.0
    assert "stage rl 10/50  step 30  about 80 s left in this stage" in drawn(known)
    assert Known("x", {}, rows).seconds_left is None


@pytest.mark.parametrize(
    ("known", "state"),
    [
        (Known("x"), "not started"),
        (Known("x", evaluations=[{"step": 0, "summary": {}}]), "running"),
        (Known("x", metrics=[{"step": 3}]), "running"),
        (Known("x", metrics=[{"step": 3}], summary={"steps": 3}), "finished"),
        # The summary of a run that goes on is that of its first end.
        (Known("x", metrics=[{"step": 4}], summary={"steps": 3}), "running"),
    ],
    ids=["nothing", "evaluated", "stepping", "finished", "resumed"],
)
def test_a_run_is_started_and_finished_when_its_files_say_so(known, state):
    assert known.state == state
    assert state in drawn(known)


def test_a_run_that_falls_silent_is_said_to():
    known = Known("x", CONFIG, [{"step": 1, "stage": "rl", "time/step": 30.0}])
    known.silent_seconds = 299.0
    assert "no new line" not in drawn(known)
    known.silent_seconds = 301.0
    assert "no new line for 5 min 01 s" in drawn(known)


def test_limits_of_the_run_raise_alarms_in_the_trainers_words():
    known = Known("x", CONFIG, [{"step": 1, "mismatch/ess": 0.4, "mismatch/warnings": 1.0}])
    (line,) = alarms(known)
    assert line.startswith("mismatch/ess = 0.4 is below mismatch.warn.ess = 0.5; ")
    assert "1 of 1 steps with a warning" in drawn(known)
    assert alarms(Known("x", CONFIG, [{"step": 1, "mismatch/ess": 0.6}])) == []
    # Without limits of its own nothing is judged, and nothing invented.
    assert alarms(Known("x", {}, [{"step": 1, "mismatch/ess": 0.0}])) == []


def test_sparklines_go_from_the_least_to_the_largest():
    assert sparkline([0.0, 3.5, 7.0]) == BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert sparkline([1.0, math.nan, 1.0]) == f"{BLOCKS[0]} {BLOCKS[0]}"
    assert len(sparkline(range(100), 24)) == 24


def test_a_whole_run_is_in_the_picture_and_in_the_numbers(tmp_path, make_run):
    known = Watched(make_run(tmp_path / "run")).look()
    text = drawn(known)
    assert known.state == "finished"
    assert "harmful  at step 40" in text
    minus = "\N{MINUS SIGN}"
    assert f"held-out gain {minus}0.100 [{minus}0.120, {minus}0.080] nats per token" in text
    assert "last rollout: plain, step 40" in text
    assert "best  gain +0.167  plain thought 1" in text
    assert f"worst gain {minus}1.833  plain thought -5" in text
    found = numbers(known)
    assert (found["step"], found["evaluation"]["verdict"]) == (40, "harmful")
    assert found["metrics"] == {"reward/mean": 4.0}


def test_text_of_the_web_moves_no_cursor_and_makes_no_markup(tmp_path, make_run):
    text = drawn(Watched(make_run(tmp_path / "run", "\x1b[2J[bold]x[/bold]\r")).look())
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\\u001b[2J[bold]x[/bold]\\u000d" in text


def test_numbers_that_are_none_are_shown_as_they_are():
    known = Known("x", CONFIG, [{"step": 1, "stage": "rl", "reward/mean": math.nan}])
    assert "nan" in drawn(known)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e308", "-1e308", "1e149"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "summary.json"])
def test_a_number_that_nothing_measures_stops_neither_view(
    tmp_path, make_run, undrawn, name, number
):
    path = make_run(tmp_path / "run") / name
    path.write_text(re.sub(r": -?\d+\.\d+(?=[,}])", f": {number}", path.read_text()))
    known = Watched(path.parent).look()
    drawn(known)
    write([path.parent])
    # Of a run that diverged every line is shown.
    assert len(known.metrics) == 40
    assert known.damaged == 0


def test_what_is_infinite_is_no_damage_and_what_nothing_measures_is():
    for number in (math.inf, -math.inf, math.nan, 1e149, -3):
        fitting({"logp": number}, {"logp!": NUMBER})
    for number in (1e150, -1e308):
        with pytest.raises(ValueError, match="logp is not a number"):
            fitting({"logp": number}, {"logp!": NUMBER})
    found = metrics_row(b'{"step": 1, "stage": "rl", "a": -1e150, "b": -1e149, "c": Infinity}')
    assert (found["a"], found["b"], found["c"]) == (-math.inf, -1e149, math.inf)


def test_a_stage_has_a_count_of_steps_or_its_configuration_is_damaged(tmp_path, make_run):
    path = make_run(tmp_path / "run") / "config.json"
    path.write_text('{"stage": [{"name": "rl", "steps": 1e9}]}')
    missing = []
    assert read_object(path, "it", missing, CONFIG_SHAPE) == {}
    assert missing == ["config.json: damaged (steps is not a count), so it cannot be shown"]


def test_a_dump_caught_half_written_waits_for_its_end(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    path = run / "rollouts" / "step_000050.jsonl.zst"
    whole = (run / "rollouts" / "step_000040.jsonl.zst").read_bytes()
    path.write_bytes(whole[:-9])
    watched = Watched(run)
    assert watched.look().group is None
    path.write_bytes(whole)
    assert watched.look().group["step"] == 40


def test_once_prints_one_picture_and_json_its_numbers(tmp_path, make_run, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as left:
        main(["watch", str(run), "--once", "--json"])
    assert left.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1])["state"] == "finished"
    assert "finished" in said[0]
    # No terminal, no live view: the same picture.
    with pytest.raises(SystemExit):
        main(["watch", str(run)])
    assert capsys.readouterr().out.splitlines() == said[:-1]


def test_a_run_that_has_not_started_is_no_mistake_and_a_file_is(tmp_path):
    assert numbers(Watched(tmp_path / "later").look())["state"] == "not started"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Watched(tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["q", "ctrl-C"])
def test_the_live_view_follows_and_leaves_when_asked(tmp_path, make_run, leave):
    run = make_run(tmp_path / "run")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "rlpt.cli", "watch", str(run), "--every", "0.1"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        assert "finished" in until(ours, "finished")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 41, "stage": "more"}\n')
        assert "running" in until(ours, "running")
        if leave == "q":
            os.write(ours, b"q")
        else:
            process.send_signal(signal.SIGINT)
        until(ours, None)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def until(terminal, word, seconds=60.0):
    """What the terminal showed up to a word; up to its end where there is none."""
    shown, end = "", time.monotonic() + seconds
    while (word is None or word not in shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 1 << 16).decode(errors="replace")
            except OSError:
                break
    return shown
