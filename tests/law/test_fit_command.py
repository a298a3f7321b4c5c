"""`rlpt fit` from end to end: the files, the words, the exit codes."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlpt import cli


def fit(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *map(str, words)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def numbers(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, float):
        yield value


def csv(path: Path, points) -> Path:
    rows = "".join(f"{x},{y}\n" for x, y in zip(points.compute_N, points.value_N, strict=True))
    path.write_text("hours,rate\n" + rows)
    return path


def test_a_run_is_fitted_beside_its_files(
    thinking_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(thinking_run, "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert json.loads((thinking_run / "fit.json").read_text()).items() <= found.items()
    (run,) = found["runs"]
    assert run["start"] == {"value": -0.1, "from": "the first point, at 0"}
    assert {name: round(p["value"], 4) for name, p in run["parameters"].items()} == {
        "A": 0.2,
        "B": 1.5,
        "C_mid": 60.0,
    }
    assert run["hold_out"]["rms"] == pytest.approx(0, abs=1e-5)
    assert run["r_squared"] == pytest.approx(1)
    assert "10 points fitted, 0 dropped before 10 steps; R0 is the first point, at 0" in out
    assert all(math.isfinite(value) for value in numbers(found))
    assert ElementTree.parse(thinking_run / "fit.svg").getroot().tag.endswith("svg")
    assert (thinking_run / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_through_a_link(known, tmp_path: Path) -> None:
    path = csv(tmp_path / "early.csv", known.measured(100, 1500, 15))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    names = ("fit.json", "fit.png", "fit.svg")
    for name in names:
        (tmp_path / name).symlink_to(mine)
    assert fit(path, "--x", "hours", "--y", "rate", "--start-value", 0.3) == 0
    assert mine.read_text() == "mine"
    assert not any((tmp_path / name).is_symlink() for name in names)


def test_a_ceiling_without_an_end_is_an_answer(
    known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = csv(tmp_path / "early.csv", known.measured(100, 1500, 15))
    assert fit(path, "--x", "hours", "--y", "rate", "--start-value", 0.3, "--json") == 0
    out = capsys.readouterr().out
    assert "no end]" in out
    assert "A cannot be bounded from above" in out
    ceiling = json.loads(out.splitlines()[-1])["runs"][0]["parameters"]["A"]
    assert ceiling["ci_high"] is None
    assert ceiling["reason"].startswith("cannot be bounded from above")


def test_runs_are_compared_under_one_ceiling(
    known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = csv(tmp_path / "first.csv", known.measured(400, 16000, 40, (2542, 1.92, 0.61)))
    second = csv(tmp_path / "second.csv", known.measured(400, 16000, 40, (4000, 1.5, 0.61), seed=1))
    words = ("--x", "hours", "--y", "rate", "--start-value", 0.3, "--shared-ceiling", "--json")
    assert fit(first, second, *words) == 0
    out = capsys.readouterr().out
    shared = json.loads(out.splitlines()[-1])["shared_ceiling"]
    assert shared["ceiling"]["value"] == pytest.approx(0.61, abs=0.01)
    assert shared["p_value"] > 0.05
    assert [run["name"] for run in shared["runs"]] == ["first", "second"]
    assert shared["runs"][1]["parameters"]["C_mid"]["value"] == pytest.approx(4000, rel=0.05)
    assert "the runs agree with one ceiling" in out
    assert (tmp_path / "fit.json").is_file()


def test_the_power_law_is_fitted_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{step},{0.45 - 3 / step**0.5}\n" for step in (100, 200, 400, 800, 1000, 1200))
    (tmp_path / "rpt.csv").write_text("step,accuracy\n" + rows)
    words = (
        "--x",
        "step",
        "--y",
        "accuracy",
        "--law",
        "power",
        "--out",
        tmp_path / "new",
        "--json",
    )
    assert fit(tmp_path / "rpt.csv", *words) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["all_parameters"] == pytest.approx({"P*": 0.45, "alpha": 0.5, "A": -3.0}, rel=1e-4)
    assert run["start"] is None
    assert run["hold_out"] is None
    assert (tmp_path / "new" / "fit.json").is_file()


def test_runs_of_one_name_are_told_apart_by_their_paths(
    known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / seed for seed in ("seed_0", "seed_1")]
    for folder in folders:
        folder.mkdir()
    paths = [csv(folder / "gain.csv", known.measured(400, 16000, 12)) for folder in folders]
    assert fit(*paths, "--x", "hours", "--y", "rate", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["name"] for run in found["runs"]] == [str(path) for path in paths]
    assert found["out"] == str(tmp_path / "fit.json")


def test_a_column_may_have_any_name(known, tmp_path: Path) -> None:
    path = csv(tmp_path / "named.csv", known.measured(400, 16000, 12))
    path.write_text(path.read_text().replace("hours,rate", "x,gain against $base"))
    assert fit(path, "--x", "x", "--y", "gain against $base") == 0
    assert "gain against $base" in (tmp_path / "fit.svg").read_text()


def test_a_source_is_named_once_and_out_is_a_folder(
    thinking_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(thinking_run, thinking_run / "." / "..", thinking_run) == 2
    assert "given twice" in capsys.readouterr().err
    assert fit(thinking_run, "--out", thinking_run / "config.json") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--y", "gain"], "nearest: gain_heldout.mean"),
        (["--skip-before", "100000"], "0 of 11 points"),
        (["--shared-ceiling"], "--shared-ceiling: one run alone"),
        (["--law", "power", "--start-value", "1"], "--start-value: the power law has no start"),
        (["--hold-out", "0.99"], "--hold-out 0.99 leaves fewer than 4 points"),
        (["--hold-out", "1"], "--hold-out"),
        (["--law", "cubic"], "'sigmoid', 'power'"),
    ],
    ids=["metric", "skip", "alone", "start", "hold-out", "all held out", "law"],
)
def test_a_mistake_is_one_line_and_exit_2(
    thinking_run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert fit(thinking_run, *words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert said in output.err
    assert not (thinking_run / "fit.json").exists()
