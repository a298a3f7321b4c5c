"""Whole runs inside a chat frame: one forward or two, an evaluation job, predictions that are matched."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlpt.config import RunConfig
from rlpt.evaluate.job import run as evaluate
from rlpt.flops import document_tokens
from rlpt.jobs import EvalJobConfig
from rlpt.runlog import read_journal
from rlpt.stages import RLStage
from rlpt.train import run
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, load, parse

FRAME = "{kind = 'chat', template = 'chatml', system = 'You know the river.', prefill = 'Well,'}"


def framed_run(toml: Path, shards: ShardFolder, name: str, *more: str) -> Path:
    run_dir = toml.parent / name
    overrides = [
        *(f"run_dir={run_dir}", f"data.shards={shards.path}", f"prompts.frame={FRAME}"),
        *("stage.0.steps=2", "stage.1.steps=5", *more),
    ]
    run(load(RunConfig, toml, overrides))
    return run_dir


def planned(run_dir: Path) -> int:
    """Most tokens of a step's one training forward, before any text is known."""
    cfg = parse(RunConfig, json.loads((run_dir / "config.json").read_text()), "config.json")
    stage = cfg.stage[1]
    assert isinstance(stage, RLStage)
    return stage.documents_per_step * document_tokens(cfg, stage, "shared", continuations=True)


@pytest.mark.slow
def test_rewards_in_a_frame_are_the_same_from_one_forward_and_from_two(
    toml: Path, chat_shards: ShardFolder
) -> None:
    both = []
    for how in ("training_forward", "separate_pass"):
        update = f"stage.1.update={{score_with='{how}'}}"
        run_dir = framed_run(
            *(toml, chat_shards, how, update, "stage.1.objective.gold_weight=0.1"),
            "stage.1.micro_batch_tokens=20000",
        )
        rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
        assert len(rows) == 5
        most = max(row["tokens/train"] for row in rows)
        assert 0.8 * planned(run_dir) <= most <= planned(run_dir)
        both.append([(r["reward/likelihood"], r["gain/mean"], r["loss/grad_norm"]) for r in rows])
    assert np.allclose(both[0], both[1], atol=2e-4)
    assert len({each[1] for each in both[0]}) == 5


@pytest.mark.slow
def test_an_evaluation_job_repeats_a_run_in_a_frame(toml: Path, chat_shards: ShardFolder) -> None:
    run_dir = framed_run(toml, chat_shards, "own", "stage.1.steps=1")
    config = json.loads((run_dir / "config.json").read_text())
    table = {name: config[name] for name in ("seed", "prompts", "thought", "engine", "evaluation")}
    table |= {
        "run": f"{run_dir}@last",
        "shards": str(chat_shards.path),
        "out_dir": str(toml.parent / "eval"),
    }
    found = evaluate(parse(EvalJobConfig, table, "test"))
    own = read_journal(run_dir / "evaluations.jsonl")[-1]["summary"]
    assert found["gain_heldout"]["mean"] == pytest.approx(own["gain_heldout"]["mean"], abs=1e-7)
    assert found["null"]["passes"]


@pytest.mark.slow
def test_predictions_are_matched_inside_a_frame(toml: Path, chat_shards: ShardFolder) -> None:
    """A warmed-up policy hits one-token predictions by chance; with marks that it never writes there is no answer."""
    reward = ("stage.1.reward={kind='match', how='first_token'}", "thought.prediction_tokens=2")
    few = ("stage.0.steps=30", "stage.0.optimizer.lr=1e-2", "stage.1.group_size=8")
    words = ("prompts.frame.answer_open=<a>", "prompts.frame.answer_close=</a>")
    paid = []
    for name, more in (("whole", ()), ("marked", words)):
        run_dir = framed_run(toml, chat_shards, name, *reward, *few, *more)
        rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
        paid.append(sum(row["reward/match"] for row in rows))
    assert paid[0] > 0.0
    assert paid[1] == 0.0


def test_another_models_probabilities_are_refused_in_a_frame(
    toml: Path, chat_shards: ShardFolder
) -> None:
    reward = "stage.1.reward={kind='likelihood', scorer='foreign', foreign={path='model'}}"
    with pytest.raises(UserError, match=r"stage rl: reward\.foreign reads no chat; set prompts"):
        framed_run(toml, chat_shards, "own", reward)


def test_a_frame_takes_positions(toml: Path, chat_shards: ShardFolder) -> None:
    """32 tokens of context, 5 of thought, 2 markers and 4 of horizon are 43; the chat is the rest."""
    small = ("policy.fresh.max_positions=64", "evaluation.bits_per_byte_tokens=40")
    chat = (
        *(
            "*system\nYou know the river.*\n*user\nContinue the following text.\n\n",
            "*\n*assistant\n",
        ),
        *("Well,", "\n\n"),
    )
    longest = 43 + len("".join(chat))
    with pytest.raises(UserError, match=f"max_positions = 64: .* has {longest} tokens"):
        framed_run(toml, chat_shards, "own", *small)
