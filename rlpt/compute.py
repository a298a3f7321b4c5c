"""What a run has spent, step by step: its journal and configuration in, cumulated steps, tokens, FLOPs and seconds out.

The one place where compute is added up: ladders of checkpoints, the law and comparisons take their axes from here, and
FLOPs, decoding included, from `rlpt.flops`, which counts a step at its longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlpt.config import RunConfig
from rlpt.flops import Cost, step_cost
from rlpt.mixture import open_shards
from rlpt.policy.load import blueprint
from rlpt.runlog import read_config, read_journal
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse


@dataclass(frozen=True)
class Spent:
    """By a run, up to and with a step. What made the weights it began with is not in it."""

    steps: int = 0
    sampled_tokens: float = 0.0
    """Of thoughts, closers and predictions, over all ranks."""
    trained_tokens: float = 0.0
    """Computed forward and backward, over all ranks."""
    flops: float | None = 0.0
    """Decoding included, every step at its longest; None: not counted."""
    seconds: float = 0.0
    """Of its steps, by the clock; evaluations and checkpoints are left out."""

    @property
    def tokens(self) -> float:
        return self.sampled_tokens + self.trained_tokens

    def __add__(self, other: "Spent") -> "Spent":
        known = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Spent(
            self.steps + other.steps,
            self.sampled_tokens + other.sampled_tokens,
            self.trained_tokens + other.trained_tokens,
            known,
            self.seconds + other.seconds,
        )

    def as_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "sampled_tokens": self.sampled_tokens,
            "trained_tokens": self.trained_tokens,
            "flops": self.flops,
            "seconds": self.seconds,
        }


def cumulative_costs(
    run_dir: Path, shards: ShardFolder | None = None, *, flops: bool = True
) -> dict[int, Spent]:
    """step -> what the run had spent when it was done; step 0: nothing.

    FLOPs need the vocabulary, so shards: any with the run's tokenizer, its own where none are given. ``flops=False``
    leaves them out and opens none. Raises UserError where the folder is no run's, or the policy or shards are gone.
    """
    rows = read_journal(run_dir / "metrics.jsonl")
    of_stage: dict[str, float | None] = dict.fromkeys((row["stage"] for row in rows), None)
    if flops and rows:
        cfg = parse(RunConfig, read_config(_file(run_dir, "config.json")), str(run_dir))
        ranks = read_config(_file(run_dir, "environment.json"))["ranks"]
        of_stage |= {name: cost.flops for name, cost in step_costs(cfg, shards, ranks).items()}
    return summed(rows, of_stage)


def _file(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not path.is_file():
        raise UserError(f"{path}: absent, so the compute of this run is unknown; restore the file")
    return path


def summed(
    rows: Sequence[dict[str, Any]], flops_of_stage: dict[str, float | None]
) -> dict[int, Spent]:
    """Lines of a journal, added up; the FLOPs of a step are those of its stage."""
    steps = [
        Spent(
            1,
            row.get("tokens/rollout") or 0.0,
            row.get("tokens/train") or 0.0,
            flops_of_stage.get(row["stage"]),
            row.get("time/step") or 0.0,
        )
        for row in rows
    ]
    return dict(
        zip([0, *(row["step"] for row in rows)], accumulate(steps, initial=Spent()), strict=True)
    )


def step_costs(
    cfg: RunConfig, shards: ShardFolder | None = None, ranks: int = 1
) -> dict[str, Cost]:
    """Of a step of every stage, by its name."""
    folder = open_shards(cfg.data) if shards is None else shards
    plan = blueprint(cfg.policy, folder, cfg.longest_path, cfg.prompts.frame)
    return {
        stage.name: step_cost(cfg, stage, plan.config, plan.layout, ranks) for stage in cfg.stage
    }
