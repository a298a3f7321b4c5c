"""A judge over HTTP: what it gets, what is tried again, and a run that is rewarded by one."""

import json
import time
from pathlib import Path

import pytest

from rlpt.config import RunConfig
from rlpt.exits import FaultError
from rlpt.reward.endpoint import Endpoint, UnansweredError
from rlpt.reward.judge import Pair, question, verdict_of
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import UserError, load


@pytest.fixture(scope="module")
def rule_judge(beside):
    return beside("rule_judge")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpt.reward.endpoint._FIRST_WAIT", 0.001)


def endpoint(address: str, token: str | None = None, attempts: int = 3, timeout: float = 5.0):
    return Endpoint(address, "m", token, timeout, attempts, 64)


def test_the_endpoint_gets_one_question_with_the_token_in_the_header_alone(rule_judge) -> None:
    with rule_judge.served(lambda _: "Score: 1") as server:
        assert endpoint(server.address, "s3cret").answer("ok?") == "Score: 1"
        assert endpoint(server.address).answer("ok?") == "Score: 1"
    first, second = server.seen
    assert first.pop("headers")["Authorization"] == "Bearer s3cret"
    assert "Authorization" not in second["headers"]
    assert first == {
        "path": "/v1/chat/completions",
        "model": "m",
        "messages": [{"role": "user", "content": "ok?"}],
        "temperature": 0,
        "max_tokens": 64,
    }


@pytest.mark.parametrize(
    ("statuses", "asked"),
    [([503, 429], 3), ([500, 500, 500], 3), ([404], 1), ([307], 1)],
    ids=["recovers", "gives-up", "wrong", "redirect"],
)
def test_what_may_pass_is_tried_again_and_what_is_wrong_is_not(
    rule_judge, statuses: list[int], asked: int
) -> None:
    answers = iter([*statuses, "Score: 0"])
    with rule_judge.served(lambda _: next(answers)) as server:
        if len(statuses) < asked:
            assert endpoint(server.address).answer("ok?") == "Score: 0"
        else:
            with pytest.raises(UnansweredError, match=f"HTTP status {statuses[-1]}"):
                endpoint(server.address).answer("ok?")
    assert len(server.seen) == asked


def test_silence_and_an_empty_port_are_no_answers(rule_judge) -> None:
    def late(_: str) -> str:
        time.sleep(0.3)
        return "Score: 1"

    with (
        rule_judge.served(late) as server,
        pytest.raises(UnansweredError, match="TimeoutError"),
    ):
        endpoint(server.address, attempts=2, timeout=0.05).answer("ok?")
    assert len(server.seen) == 2
    with pytest.raises(UnansweredError, match="ConnectionRefused"):
        endpoint(server.address).answer("ok?")


def test_an_answer_without_text_is_no_verdict(rule_judge) -> None:
    with rule_judge.served(lambda _: None) as server:
        assert verdict_of(endpoint(server.address).answer("ok?")).lost == "rubbish"


def test_the_stand_in_reads_the_question_and_follows_its_rule(rule_judge) -> None:
    for said, score in (("the river", 1.0), ("the sea\nwide", 0.0), ("then the river", 1.0)):
        asked = question(Pair(said, "the river then\nruns on and on"), "prefix")
        assert verdict_of(rule_judge.rule(asked)).score == score


def overrides(address: str, *more: str) -> list[str]:
    reward = f"{{kind='judge', address='{address}', model='m', attempts=1}}"
    return [
        f"stage.1.reward={reward}",
        "thought.prediction_tokens=4",
        "stage.0.steps=2",
        "stage.1.steps=3",
        *more,
    ]


def test_a_run_is_rewarded_by_a_judge_and_its_token_is_in_no_file(
    rule_judge, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPT_JUDGE_TOKEN", "s3cret-of-the-judge")
    with rule_judge.served(lambda asked: f"Score: {len(asked) % 2}") as server:
        run(load(RunConfig, toml, overrides(server.address)))
    run_dir = toml.parent / "run"
    rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
    assert len(rows) == 3
    assert all(row["reward/judge_failed"] == row["reward/judge_rubbish"] == 0.0 for row in rows)
    assert all(0.0 < row["reward/judge_questions"] <= 1.0 for row in rows)
    assert any(0.0 < row["reward/judge"] < 1.0 for row in rows)
    # One question in advance, and what was asked in the steps.
    rollouts = 4 * 2 * 3
    asked = sum(row["reward/judge_questions"] * rollouts for row in rows)
    assert len(server.seen) == 1 + round(asked)
    assert all(each["headers"]["Authorization"].endswith("judge") for each in server.seen)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert json.loads((run_dir / "config.json").read_text())["stage"][1]["reward"]["model"] == "m"
    assert not any(b"s3cret" in path.read_bytes() for path in files)


def test_a_judge_that_is_not_there_is_refused_before_any_model_loads(
    rule_judge, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rule_judge.served() as server:
        address = server.address
    monkeypatch.setattr("rlpt.session.load.load", None)
    with pytest.raises(UserError, match=r"the judge does not answer .*; start it, or correct"):
        run(load(RunConfig, toml, overrides(address)))
    assert not (toml.parent / "run" / "metrics.jsonl").exists()


def test_a_judge_that_talks_rubbish_ends_the_run_and_says_so(rule_judge, toml: Path) -> None:
    with (
        rule_judge.served(lambda _: "As you wish") as server,
        pytest.raises(FaultError, match=r"no verdict, more than max_failed_share = 0\.1"),
    ):
        run(load(RunConfig, toml, overrides(server.address)))
