"""Shards, run folders and evaluation jobs, all tiny: what tests of `rlpt eval` are made with."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rlpt import checkpoint, dist, runlog
from rlpt.config import RunConfig
from rlpt.jobs import EvalJobConfig
from rlpt.observe import CheckpointConfig
from rlpt.policy import load
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import parse

FRESH = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32, "init_std": 0.3}
EVALUATION = {
    **{"split": "train", "prompts": 36, "bootstrap": 40},
    **{
        "bits_per_byte_documents": 4,
        "bits_per_byte_tokens": 32,
        "leak_prompts": 0,
        "greedy": False,
    },
}
SMALL = EVALUATION | {"controls": ["empty", "filler"], "bits_per_byte_documents": 0}


def shards(folder: Path, vocab_size: int = 300) -> Path:
    """240 pages of one corpus; another size of the vocabulary is another tokenizer."""
    (folder / "corpus").mkdir(parents=True)
    for n in range(240):
        lines = [
            f"Page {n} counts {k * n % 13} boats, then {k + n} </think> carts." for k in range(9)
        ]
        (folder / "corpus" / f"{n}.txt").write_text("\n\n".join(lines))
    table = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(folder / "corpus")},
        "tokenizer": {"kind": "bpe", "vocab_size": vocab_size},
    }
    prepare(parse(PrepareConfig, table, "test"))
    return folder / "shards"


def saved_run(
    run_dir: Path, shards_dir: Path, compute_dtype: str = "float32", steps: Sequence[int] = (1,)
) -> Path:
    """A run folder with checkpoints of other weights each; its prompts and thoughts are not the defaults."""
    table = {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards_dir)},
        "policy": {"fresh": FRESH, "compute_dtype": compute_dtype},
        "prompts": {"context_tokens": 9, "min_context_tokens": 5, "horizon_tokens": 2},
        "thought": {"budget_tokens": 2},
        "stage": [{"name": "s", "kind": "next_token", "steps": 9, "documents_per_step": 1}],
    }
    cfg = parse(RunConfig, table, "test")
    folder = ShardFolder.open(shards_dir)
    keep = CheckpointConfig(keep_last=len(steps))
    with dist.world() as world, closing(checkpoint.Saver(run_dir, keep, world)) as saver:
        for step in steps:
            plan = load.blueprint(cfg.policy, folder, 100)
            policy = load.load(cfg.policy, plan, world, seed=3 + step)
            progress = checkpoint.Progress(step=step, tokenizer=str(folder.manifest.tokenizer_hash))
            saver.save(progress, {"policy": policy})
            saver.settle()
    runlog.write_json(run_dir / "config.json", runlog.resolved(cfg))
    runlog.write_json(run_dir / "environment.json", {"ranks": 1})
    for step in range(1, max(steps) + 1):
        row = {"step": step, "stage": "s", "tokens/train": 100.0, "time/step": 0.5}
        runlog.append_json(run_dir / "metrics.jsonl", row)
    return run_dir


def job_of(run_dir: Path, shards_dir: Path, out: Path, **changed) -> EvalJobConfig:
    """A job that leaves prompts and thoughts to the run."""
    table = {
        "run": f"{run_dir}@last",
        "shards": str(shards_dir),
        "out_dir": str(out),
        "evaluation": EVALUATION,
    }
    return parse(EvalJobConfig, table | changed, "test")


def job(shards_dir: Path, out: Path, **changed) -> EvalJobConfig:
    """A job on fresh weights."""
    table = {
        "policy": {"fresh": FRESH},
        "shards": str(shards_dir),
        "out_dir": str(out),
        "prompts": {"context_tokens": 24, "min_context_tokens": 4, "horizon_tokens": 3},
        "thought": {"budget_tokens": 3},
        "evaluation": EVALUATION,
    }
    return parse(EvalJobConfig, table | changed, "test")


def found(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())
