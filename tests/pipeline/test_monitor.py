"""The mismatch monitor in a run: what it logs, says once, and ends."""

import json
from pathlib import Path

import pytest

from rlpt import checkpoint
from rlpt.config import RunConfig
from rlpt.train import run
from rlpt_data.strict import UserError, load

SHORT = [
    *("stage.0.steps=2", "stage.1.steps=4", "checkpoint.every=1"),
    *("evaluation.prompts=8", "evaluation.bits_per_byte_documents=0"),
]


def rows_of(toml: Path) -> list[dict]:
    lines = (toml.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "rl"]


def test_a_synchronous_run_in_float32_is_quiet(toml: Path, capsys: pytest.CaptureFixture) -> None:
    run(load(RunConfig, toml, SHORT))
    assert len(rows_of(toml)) == 4
    for row in rows_of(toml):
        assert (row["mismatch/warnings"], row["mismatch/current_share"]) == (0.0, 1.0)
        assert row["mismatch/ess"] == pytest.approx(1.0, abs=1e-9)
        assert 0 < row["mismatch/max_abs_log_ratio"] < 1e-5
        assert row["mismatch/current_rms_log_ratio"] == row["mismatch/rms_log_ratio"] < 1e-5
        assert row["mismatch/ratio_min"] <= row["mismatch/ratio"] <= row["mismatch/ratio_max"]
        shares = [row[f"mismatch/{name}_share"] for name in ("p00", "p01", "p10", "p50")]
        assert sum(shares) == pytest.approx(1.0)
    assert "mismatch" not in capsys.readouterr().err


def test_a_warning_is_said_once_and_counted_always(
    toml: Path, capsys: pytest.CaptureFixture
) -> None:
    run(load(RunConfig, toml, [*SHORT, "mismatch.warn.current_rms_log_ratio=1e-12"]))
    assert [row["mismatch/warnings"] for row in rows_of(toml)] == [1.0] * 4
    said = capsys.readouterr().err
    assert said.count("exceeds mismatch.warn.current_rms_log_ratio = 1e-12; the engine") == 1
    assert "stage rl, step 3: mismatch/current_rms_log_ratio = " in said


def test_a_halt_names_the_step_and_keeps_line_and_checkpoint(toml: Path) -> None:
    cfg = load(RunConfig, toml, [*SHORT, "mismatch.halt.current_rms_log_ratio=1e-12"])
    with pytest.raises(RuntimeError, match=r"stage rl, step 3: .* exceeds mismatch\.halt\.") as end:
        run(cfg)
    assert str(end.value).endswith("; the last checkpoint is kept")
    assert [row["step"] for row in rows_of(toml)] == [3]
    assert checkpoint.complete_steps(toml.parent / "run") == [1, 2]


def test_thoughts_of_older_weights_are_not_current(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that keeps its first weights: drift shows in all rows, and none is called the newest weights' own."""
    from rlpt.session import Session

    first = Session.publish
    monkeypatch.setattr(
        Session,
        "publish",
        lambda session, step: first(session, step) if session.engine.version < 0 else None,
    )
    run(load(RunConfig, toml, [*SHORT, "rollout.max_staleness=9", "rollout.ahead=0"]))
    before, *after = rows_of(toml)
    assert before["mismatch/current_share"] == 1.0
    for row in after:
        assert row["mismatch/current_share"] == 0.0
        assert "mismatch/current_rms_log_ratio" not in row
        assert row["mismatch/max_abs_log_ratio"] > 1e-4
        assert row["mismatch/ess"] < 1.0 - 1e-7


def test_an_engine_that_never_gets_the_weights_ends_a_run_on_policy(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlpt.session import Session

    first = Session.publish
    once = lambda session, step: first(session, step) if session.engine.version < 0 else None  # noqa: E731
    monkeypatch.setattr(Session, "publish", once)
    with pytest.raises(RuntimeError, match=r"older than version 3 - 0 .* says it has version 2"):
        run(load(RunConfig, toml, SHORT))


@pytest.mark.parametrize(
    "words", ["mismatch.halt.ess=1.5", "mismatch.warn.chi2=0", "mismatch.ess=0.1"]
)
def test_impossible_limits_are_refused(toml: Path, words: str) -> None:
    with pytest.raises(UserError, match="mismatch"):
        load(RunConfig, toml, [words])
