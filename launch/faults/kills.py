"""Kills at random points of every phase, and whether what goes on is what would have been.

    python launch/faults/kills.py [--kills 200] [--seed 0] [--arm NAME]... --out FOLDER [--write]

A run is started, killed, started again, killed again, until it ends; then it is compared with one that was left alone.
A kill is a real signal that the process gets at a seeded place: a phase, how often it was entered, how far into it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import JobTrial
from machine import machine
from training import EngineTrial, TrainingTrial
from trial import Trial

from rlpt.console import progress

RESULTS = Path(__file__).with_name("kills.json")
HERE = Path(__file__).parent
POOL = (
    "data.domains=['anyio']",
    "thought.prediction_tokens=4",
    "stage.1.reward={ kind = 'overlap' }",
    "stage.1.difficulty={ low = 0.1, high = 0.9, signal = 'gain_quantile', review_every = 2 }",
    "stage.1.sampling={ kind = 'dynamic', rounds = 1 }",
)
ENGINES = (
    "engine.kind=vllm",
    "engine.vllm.placement=separate",
    "engine.vllm.kv_cache_gib=0.05",
    "engine.vllm.threads=1",
    "policy.fresh.heads=1",
    "rollout.max_staleness=2",
)


class Arm(NamedTuple):
    share: float
    """Of all kills."""
    trial: Callable[[str, Path, int, Path], Trial]
    """(name, folder, seed, shards) -> what is killed."""


def training(ranks: tuple[int, ...] = (1,), settings: Sequence[str] = ()) -> Callable[..., Trial]:
    return lambda name, folder, seed, shards: TrainingTrial(
        name, folder, seed, shards, ranks, settings
    )


def preparing(name: str, folder: Path, seed: int, _shards: Path) -> Trial:
    words = ["data", "prepare", "configs/data/installed_docs.toml"]
    words += ["--set", "source.max_bytes=1000000", "--set", "workers=2"]
    return JobTrial(name, folder, seed, words, "out", ["**/*"], workers=True)


def evaluating(name: str, folder: Path, seed: int, shards: Path) -> Trial:
    words = ["eval", str(HERE / "eval.toml"), "--set", f"shards={shards}"]
    return JobTrial(name, folder, seed, words, "out_dir", ["eval.json", "prompts.parquet"])


ARMS = {
    "one rank": Arm(0.45, training()),
    "one rank, pool and dynamic sampling": Arm(0.15, training(settings=POOL)),
    "two ranks": Arm(0.125, training((2,))),
    "1, 2 or 4 ranks": Arm(0.075, training((1, 2, 4))),
    "data prepare, 2 workers": Arm(0.10, preparing),
    "eval": Arm(0.10, evaluating),
}
"""The engines' arm is apart: it needs vLLM."""
ENGINE_ARMS = {
    "asynchronous vLLM": Arm(
        1.0,
        lambda name, folder, seed, shards: EngineTrial(
            name, folder, seed, shards, settings=ENGINES
        ),
    )
}


def suite(
    arms: dict[str, Arm], kills: int, seed: int, folder: Path, shards: Path
) -> list[dict[str, Any]]:
    """A row for every arm."""
    whole = sum(arm.share for arm in arms.values())
    rows = []
    for name, arm in arms.items():
        count = round(kills * arm.share / whole)
        with progress("kills", count, 0, show=True) as report:
            rows.append(arm.trial(name, folder, seed, shards).run(count, report).row())
    return rows


COLUMNS = ("kills", "resumed_equal", "resumed_otherwise", "doubled", "lost", "hangs", "orphans")


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, with a last line of sums."""
    total = {"arm": "all"} | {name: sum(row[name] for row in rows) for name in COLUMNS}
    lines = [f"| arm | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    cells = [[str(row[name]) for name in ("arm", *COLUMNS)] for row in [*rows, total]]
    return "\n".join([*lines, *(f"| {' | '.join(each)} |" for each in cells)])


def failed(rows: list[dict[str, Any]]) -> bool:
    bad = ("resumed_otherwise", "doubled", "lost", "hangs", "orphans")
    return any(row[name] for row in rows for name in bad)


def keep(rows: list[dict[str, Any]], seed: int) -> None:
    """Into kills.json, beside the arms that were run at another time."""
    old = json.loads(RESULTS.read_text())["arms"] if RESULTS.exists() else []
    others = [row for row in old if row["arm"] not in {row["arm"] for row in rows}]
    found = [*others, *({**row, **machine(), "seed": seed} for row in rows)]
    RESULTS.write_text(json.dumps({"arms": found}, indent=1) + "\n")


def main() -> None:
    every = ARMS | ENGINE_ARMS
    parser = argparse.ArgumentParser(description="Kills at random points of every phase.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append", choices=[*every])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--shards", type=Path, default=Path("runs/data/installed_docs"))
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    words = parser.parse_args()
    # Before the server starts that lives are forked from.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    arms = {name: every[name] for name in words.arm or ARMS}
    rows = suite(arms, words.kills, words.seed, words.out.resolve(), words.shards.resolve())
    print(table(rows))
    if words.write:
        keep(rows, words.seed)
    sys.exit(failed(rows))


if __name__ == "__main__":
    main()
