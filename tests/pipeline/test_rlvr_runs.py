"""The RLVR stage through the whole pipeline: rewards are right answers, held-out accuracy is what the files say."""

import json
import signal
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt.compare import CompareConfig, markdown
from rlpt.compare import run as compare
from rlpt.config import RunConfig
from rlpt.evaluate import answers
from rlpt.reward.answer import first_line, number
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import UserError, load, parse


def sums(path: Path, pairs: list[tuple[int, int]]) -> None:
    rows = [{"question": f"{a}+{b}=", "answer": f"{a + b}"} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


RUN = """
run_dir = "{folder}/run"

[data]
shards = "{shards}"

[policy.fresh]
layers = 1
width = 32
heads = 2
mlp_width = 64
init_std = 0.1

[prompts]
context_tokens = 32
min_context_tokens = 8
horizon_tokens = 4

[thought]
budget_tokens = 4
prediction_tokens = 3

[[stage]]
name = "sums"
kind = "rlvr"
steps = 4
documents_per_step = 4
group_size = 4
optimizer = {{ lr = 1e-3 }}

[stage.questions]
train = "{folder}/train.jsonl"
test = "{folder}/test.jsonl"
template = "{{question}}{{answer}}"
held_out = 31
samples = 4

[evaluation]
split = "train"
prompts = 4
thoughts = 1
bits_per_byte_documents = 0
bootstrap = 50

[log]
rollouts_every = 1
"""


@pytest.fixture
def config(tmp_path: Path, shards_dir: Path) -> Path:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    sums(tmp_path / "train.jsonl", pairs[:60])
    sums(tmp_path / "test.jsonl", pairs[60:])
    (tmp_path / "sums.toml").write_text(RUN.format(folder=tmp_path, shards=shards_dir))
    return tmp_path / "sums.toml"


def right(prediction: str, gold: str) -> bool:
    said = number(first_line(prediction))
    return said is not None and said == Fraction(gold)


def test_accuracy_is_what_the_answers_file_says_and_rewards_what_the_rollouts_do(
    config: Path, runs
) -> None:
    # Rewards that are sometimes 1: random digits often are.
    summary = run(load(RunConfig, config))
    folder = config.parent / "run"
    rows = read_journal(folder / "answers.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(0, "sums"), (4, "sums")]
    found = answers.load(answers.path_of(folder, "sums", 4))
    assert len(found) == 31
    marks = np.array([[right(p, q.gold) for p in q.predictions] for q in found])
    empty = np.array([[right(p, q.gold) for p in q.predictions_empty] for q in found])
    assert rows[1]["rlvr/accuracy"] == pytest.approx(marks.mean())
    assert rows[1]["rlvr/accuracy_empty"] == pytest.approx(empty.mean())
    assert rows[1]["rlvr/pass_at_4"] == pytest.approx(marks.any(axis=1).mean())
    assert rows[1]["rlvr/accuracy_ci_low"] <= marks.mean() <= rows[1]["rlvr/accuracy_ci_high"]
    assert summary["rlvr"]["after"] == rows[1]
    change = rows[1]["rlvr/accuracy"] - rows[0]["rlvr/accuracy"]
    assert summary["rlvr"]["accuracy_change"]["mean"] == pytest.approx(change)
    for metrics in runs.steps_of(folder):
        assert metrics["reward/answer"] == metrics["reward/mean"]
    evidence = json.loads((folder / "questions_sums.json").read_text())
    assert (evidence["train"]["questions"], evidence["test"]["held_out"]) == (60, 31)


def test_questions_that_changed_under_a_run_are_refused(config: Path) -> None:
    cfg = load(RunConfig, config, ["stage.0.steps=1"])
    run(cfg)
    sums(config.parent / "test.jsonl", [(1, 1)])
    with pytest.raises(
        UserError, match=r"stage sums was trained with questions of hash .*test.jsonl now has"
    ):
        run(cfg)


MISTAKES = {
    "thought.prediction_tokens=0": "set thought.prediction_tokens >= 1",
    "thought.prediction_tokens=5": "exceeds thought.budget_tokens = 4",
    "stage.0.reward={kind='match'}": "answer",
    "stage.0.curriculum={}": "a question has one cut",
    "stage.0.questions.train=absent.jsonl": "no such file",
    "prompts.context_tokens=2": "longer than prompts.context_tokens",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_run_that_could_not_answer_is_refused(config: Path, override: str) -> None:
    words = [override, "prompts.min_context_tokens=1"]
    with pytest.raises(UserError, match=MISTAKES[override]):
        run(load(RunConfig, config, words), dry_run=True)


def test_a_prediction_may_be_longer_than_the_answer(config: Path) -> None:
    words = ["thought.prediction_tokens=4", "prompts.horizon_tokens=2"]
    assert run(load(RunConfig, config, words), dry_run=True)["steps"] == 4


def answers_of(run_dir: Path) -> list[tuple]:
    paths = sorted((run_dir / "answers").glob("*.zst"))
    return [(path.name, answers.load(path)) for path in paths]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_asks_on_where_it_was(
    config: Path, shards_dir: Path, tmp_path: Path, runs
) -> None:
    words = [
        "--set",
        "checkpoint.every=2",
        "--set",
        "stage.0.steps=30",
        "--set",
        "evaluation.every=4",
    ]
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace(f'"{tmp_path}/run"', f'"{tmp_path}/whole"'))
    runs.finished(other, *words)
    process = runs.started(config, *words)
    journal = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (journal.exists() and journal.read_text().count("\n") >= 7):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "resuming" in runs.finished(config, *words)
    both = [tmp_path / name for name in ("run", "whole")]
    steps, rows, found = zip(
        *(
            (runs.steps_of(each), read_journal(each / "answers.jsonl"), answers_of(each))
            for each in both
        ),
        strict=True,
    )
    assert json.dumps(steps[0]) == json.dumps(steps[1])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 9
    assert found[0] == found[1]
    weights = [runs.weights_of(each, 30) for each in both]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_ask_and_answer_what_one_does(config: Path, tmp_path: Path, runs) -> None:
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace(f'"{tmp_path}/run"', f'"{tmp_path}/two"'))
    runs.finished(config)
    runs.finished(other, ranks=2)
    one, two = (read_journal(tmp_path / name / "answers.jsonl") for name in ("run", "two"))
    assert one[0] == two[0]
    first, second = (runs.steps_of(tmp_path / name)[0] for name in ("run", "two"))
    assert first["reward/mean"] == pytest.approx(second["reward/mean"])
    assert runs.thoughts_of(tmp_path / "run")[:4] == runs.thoughts_of(tmp_path / "two")[:4]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_policy_learns_sums_from_chance(config: Path, tmp_path: Path) -> None:
    pairs = [(a, b) for a in range(5) for b in range(5)]
    sums(tmp_path / "train.jsonl", pairs)
    sums(tmp_path / "test.jsonl", pairs)
    words = [
        *("thought.budget_tokens=1", "thought.prediction_tokens=1", "log.rollouts_every=0"),
        *("stage.0.documents_per_step=25", "stage.0.group_size=16", "stage.0.steps=120"),
        *("stage.0.optimizer.lr=3e-3", "stage.0.advantage.scale=group_std"),
        *(
            "stage.0.questions.held_out=0",
            "stage.0.questions.samples=8",
            "policy.fresh.init_std=0.05",
        ),
        *("policy.fresh.layers=2", "policy.fresh.width=64"),
    ]
    found = run(load(RunConfig, config, words))["rlvr"]
    # One of nine sums, among 322 ids.
    assert found["before"]["rlvr/accuracy"] < 0.05
    assert found["after"]["rlvr/accuracy"] > 0.5
    assert found["accuracy_change"]["mean"] > 0.45


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_arms_are_compared_after_the_same_questions(
    config: Path, tmp_path: Path, toml: Path
) -> None:
    text = config.read_text().replace("layers = 1", "layers = 2")
    config.write_text(text)
    table = {
        "out_dir": str(tmp_path / "compared"),
        "base": str(toml),
        "seeds": [0],
        "set": ["stage.0.steps=2", "stage.1.steps=2"],
        "after": str(config),
        "arms": [{"name": "own"}, {"name": "noise", "set": ["stage.1.reward_control=random"]}],
    }
    found = compare(parse(CompareConfig, table, "test"))
    for name in ("own", "noise"):
        folder = tmp_path / "compared" / name / "seed_0_after"
        rows = read_journal(folder / "answers.jsonl")
        assert found["arms"][name]["answers"]["mean"] == rows[-1]["rlvr/accuracy"]
        assert found["arms"][name]["answers_before"]["mean"] == rows[0]["rlvr/accuracy"]
        # The arm's policy, not that of the file.
        assert json.loads((folder / "config.json").read_text())["policy"]["fresh"]["layers"] == 1
    assert "accuracy on held-out questions after RLVR" in markdown(found)
    with pytest.raises(UserError, match="its last stage asks no questions"):
        compare(parse(CompareConfig, table | {"after": str(toml)}, "test"))
