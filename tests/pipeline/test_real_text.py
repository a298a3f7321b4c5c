"""The pipeline on real web pages, books and a pretrained policy. Skipped where the corpus is absent."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.config import PolicyConfig, RunConfig
from rlpt.policy import load
from rlpt.policy.scoring import Scorer
from rlpt.train import run
from rlpt.types import Trunk, concat
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import parse

CORPUS = Path(os.environ.get("RLPT_CORPUS", Path(__file__).parents[2] / ".." / "shared" / "corpus"))
STORIES = CORPUS / "stories260k" / "hf"

pytestmark = pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"no corpus at {CORPUS} (set RLPT_CORPUS)"
)


def shards_of(out: Path, name: str, tokenizer: dict, limit: int) -> Path:
    table = {
        "out": str(out),
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": str(CORPUS / name)},
        "max_documents": limit,
        "tokenizer": tokenizer,
        "split": {"dev": 0.25, "test": 0.25},
    }
    prepare(parse(PrepareConfig, table, "test"))
    return out


def settings(run_dir: Path, shards: Path, policy: dict) -> RunConfig:
    stages = [
        {"name": "warmup", "kind": "next_token", "steps": 2, "documents_per_step": 4, "window_tokens": 64,
         "mix": {"plain": 0.5, "copied": 0.5, "empty": 0.0}},
        {"name": "rl", "kind": "rl", "steps": 2, "documents_per_step": 2, "group_size": 2},
    ]  # fmt: skip
    table = {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards)},
        "policy": policy,
        "prompts": {"context_tokens": 48, "min_context_tokens": 16, "horizon_tokens": 4},
        "thought": {"budget_tokens": 4},
        "stage": stages,
        "evaluation": {
            "split": "train",
            "prompts": 8,
            "thoughts": 1,
            "bits_per_byte_documents": 2,
            "bootstrap": 20,
        },
    }
    return parse(RunConfig, table, "test")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real web pages in the tokenizer of the pretrained policy."""
    tokenizer = {"kind": "file", "path": str(STORIES / "tokenizer.json")}
    return shards_of(
        tmp_path_factory.mktemp("pages") / "shards", "digitalgov.jsonl.zst", tokenizer, 120
    )


def test_a_pretrained_policy_trains_on_web_pages(pages: Path, tmp_path: Path) -> None:
    summary = run(settings(tmp_path / "run", pages, {"path": str(STORIES)}))
    assert summary["steps"] == 4
    assert summary["null"]["passes"]
    assert np.isfinite(summary["gain_heldout_after"]["mean"])


def test_a_pretrained_policy_knows_english(pages: Path, world: dist.World) -> None:
    """Loaded shard by shard, with the embedding grown by the markers, it still predicts text far above chance."""
    shards = ShardFolder.open(pages)
    cfg = PolicyConfig(path=STORIES)
    plan = load.blueprint(cfg, shards, 100)
    assert plan.vocabulary.markers.ids == (512, 513)
    policy = load.load(cfg, plan, world, seed=0)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = concat([1], shards.encode(text))
    trunk = Trunk("d", "", 0, 0, ids, np.arange(len(ids) + 1), ())
    (scores,) = Scorer(policy, (), world, 400).trunks([(trunk, 1, len(ids))])
    lm = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
    with torch.no_grad():
        logits = lm(torch.from_numpy(ids)[None]).logits[0, :-1].double()
    theirs = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids[1:])[:, None])[:, 0]
    # The markers are two more ids in the softmax: they can only take from the others.
    assert np.all(scores.logp <= theirs.numpy() + 1e-5)
    assert theirs.mean() > -1.5
    assert scores.logp.mean() > -1.7


@pytest.mark.slow
def test_long_books_train_a_fresh_policy(tmp_path: Path) -> None:
    shards = shards_of(
        tmp_path / "shards", "books.jsonl.zst", {"kind": "bpe", "vocab_size": 400}, 12
    )
    policy = {"fresh": {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64}}
    summary = run(settings(tmp_path / "run", shards, policy))
    assert summary["steps"] == 4
    assert summary["bits_per_byte_after"]["mean"] > 0
