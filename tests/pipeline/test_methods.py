"""Every choice of the RL stage runs through the whole pipeline, and says what its formula says."""

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard

from rlpt.config import RunConfig
from rlpt.evaluate.job import run as evaluate
from rlpt.jobs import EvalJobConfig
from rlpt.report import write
from rlpt.runlog import read_journal
from rlpt.train import run
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import load, parse

TEMPLATE = Path(__file__).with_name("tiny_run.toml")


def trained(toml: Path, *overrides: str) -> Path:
    """A run of two warm-up and three RL steps with changes to the RL stage."""
    words = ["stage.0.steps=2", "stage.1.steps=3", *overrides]
    run(load(RunConfig, toml, words))
    return toml.parent / "run"


def groups_of(run_dir: Path) -> list[dict]:
    files = sorted((run_dir / "rollouts").glob("*.zst"))
    return [
        json.loads(line)
        for f in files
        for line in zstandard.decompress(f.read_bytes()).decode().splitlines()
    ]


def rl_metrics(run_dir: Path) -> list[dict]:
    return [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]


def test_prefix_match_pays_byte_exact_predictions(toml: Path, shards_dir: Path) -> None:
    reward = "stage.1.reward={kind='match'}"
    words = ["stage.0.steps=40", "stage.0.optimizer.lr=1e-2", "stage.1.group_size=12"]
    run_dir = trained(
        toml, reward, "thought.prediction_tokens=2", "prompts.horizon_tokens=3", *words
    )
    token_bytes = ShardFolder.open(shards_dir).token_bytes()
    paid = 0
    for group in groups_of(run_dir):
        gold = [token.encode() for token in group["continuation_tokens"]]
        ends = {len(b"".join(gold[:n])) for n in range(1, len(gold) + 1)}
        for rollout in group["rollouts"]:
            closer = rollout["ids"].index(321)
            predicted = b"".join(token_bytes[i] for i in rollout["ids"][closer + 1 :] if i < 320)
            expected = (
                bool(predicted) and b"".join(gold).startswith(predicted) and len(predicted) in ends
            )
            assert rollout["reward"] == float(expected)
            paid += expected
    assert paid > 0


def test_a_clipped_reward_against_a_frozen_policy_stays_inside_the_clip(toml: Path) -> None:
    shapes = "shapes=[{kind='clip', limit=0.001}]"
    reward = f"stage.1.reward={{kind='likelihood', scorer='frozen', baseline='frozen', {shapes}}}"
    run_dir = trained(toml, reward, "stage.1.optimizer.lr=0.05")
    rewards = np.array([r["reward"] for g in groups_of(run_dir) for r in g["rollouts"]])
    assert np.abs(rewards).max() == 0.001
    # The policy moved, the frozen copy did not: gain and reward are no longer the same number.
    last = [r for g in groups_of(run_dir) if g["step"] == 5 for r in g["rollouts"]]
    assert any(abs(r["gain"]) > 0.002 for r in last)


def test_the_batch_std_scales_advantages_to_one(toml: Path) -> None:
    run_dir = trained(
        toml, "stage.1.advantage={baseline='group_mean', scale='batch_std'}", "stage.1.group_size=4"
    )
    advantages = np.array(
        [[r["advantage"] for r in g["rollouts"]] for g in groups_of(run_dir) if g["step"] == 3]
    )
    assert np.allclose(advantages.mean(axis=1), 0.0, atol=1e-9)
    assert np.sqrt((advantages**2).mean()) == pytest.approx(1.0, abs=1e-6)


def test_permuted_rewards_are_the_groups_own_in_another_order(toml: Path) -> None:
    run_dir = trained(
        toml, "stage.1.reward_control=permuted", "stage.1.advantage={baseline='group_mean'}"
    )
    moved = 0
    for group in groups_of(run_dir):
        rewards = np.array([r["reward"] for r in group["rollouts"]])
        advantages = np.array([r["advantage"] for r in group["rollouts"]])
        assert np.allclose(np.sort(rewards - rewards.mean()), np.sort(advantages), atol=1e-9)
        moved += not np.allclose(rewards - rewards.mean(), advantages, atol=1e-9)
    assert moved > 0


def test_evaluations_come_at_their_period(toml: Path) -> None:
    run_dir = trained(toml, "stage.1.steps=5", "evaluation.every=2")
    assert [row["step"] for row in read_journal(run_dir / "evaluations.jsonl")] == [2, 4, 6, 7]


@pytest.mark.slow
def test_an_evaluation_job_repeats_the_runs_own_evaluation(
    toml: Path, shards_dir: Path, tmp_path: Path
) -> None:
    run_dir = trained(toml)
    config = json.loads((run_dir / "config.json").read_text())
    table = {name: config[name] for name in ("seed", "prompts", "thought", "engine", "evaluation")}
    table |= {
        "run": f"{run_dir}@last",
        "shards": str(shards_dir),
        "out_dir": str(tmp_path / "eval"),
    }
    found = evaluate(parse(EvalJobConfig, table, "test"))
    own = read_journal(run_dir / "evaluations.jsonl")[-1]["summary"]
    assert found["gain_heldout"]["mean"] == pytest.approx(own["gain_heldout"]["mean"], abs=1e-7)
    assert found["bits_per_byte"]["mean"] == pytest.approx(own["bits_per_byte"]["mean"], abs=1e-7)
    assert found["verdict"] == own["verdict"]


@pytest.mark.slow
def test_a_page_that_spells_the_markers_is_plain_text_from_shard_to_report(tmp_path: Path) -> None:
    """Text with `<think>`, `</think>`, `<|endoftext|>` and tags of HTML goes through everything as text."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(80):
        lines = [
            f"Page {n}: <think> he said {k} </think> and <|endoftext|> <script>x()</script>."
            for k in range(9)
        ]
        (corpus / f"{n:02d}.txt").write_text("\n\n".join(lines))
    table = {
        "out": str(tmp_path / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(corpus)},
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
    }
    prepare(parse(PrepareConfig, table, "test"))
    shards = ShardFolder.open(tmp_path / "shards")
    markers = {300, 301}
    assert all(not markers & set(document.ids.tolist()) for document in shards.split("train"))
    text = (
        TEMPLATE.read_text()
        .replace("{run_dir}", str(tmp_path / "run"))
        .replace("{shards}", str(tmp_path / "shards"))
    )
    (tmp_path / "run.toml").write_text(text)
    run_dir = trained(tmp_path / "run.toml")
    shown = "".join(
        group["context"] + "".join(group["continuation_tokens"]) for group in groups_of(run_dir)
    )
    assert "</think>" in shown
    page = write([run_dir]).read_text()
    (packed,) = re.findall(r'id="rollouts-data">([^<]*)<', page)
    assert "</think>" in gzip.decompress(base64.b64decode(packed)).decode()
    # The page's own data and script, and nothing of the web's.
    assert page.count("<script") == page.count("</script") == 2
