"""The RLVR stage through the whole pipeline: rewards are right answers, held-out accuracy is what the files say."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from rlpt.config import RunConfig
from rlpt.evaluate import answers
from rlpt.reward.answer import first_line, number
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.strict import UserError, load


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
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path, shards=shards_dir))
    return tmp_path / "run.toml"


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
