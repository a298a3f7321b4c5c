"""What a checkpoint costs a run: ours, written while it trains, beside DCP's own `async_save` and synchronous saves.

    python launch/bench/checkpoint.py [--rounds 5] [--steps 20] [--threads 2] [--json] [--write]

Steps are those of configs/train/quickstart.toml (RL, reference engine, a policy of 4 layers) on documents of random
words. A block is a save and the steps after it, with a wait for the save at its end; blocks of the arms take turns, and
one of every round saves nothing. What a block takes longer is the cost of its save; its share is of as many steps as
lie between two checkpoints by default.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from step import cpu_name
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as sync_save

from rlpt import dist
from rlpt.checkpoint import Progress, Saver
from rlpt.checkpoint.reading import state_of
from rlpt.config import RunConfig
from rlpt.console import progress as progress_bar
from rlpt.mixture import open_shards
from rlpt.observe import CheckpointConfig
from rlpt.policy.load import blueprint
from rlpt.runlog import open_log
from rlpt.session import Session
from rlpt.stages import RLStage
from rlpt.train import run_step
from rlpt.work import Work
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.strict import load, parse

RESULTS = Path(__file__).with_name("checkpoint.json")
QUICKSTART = Path("configs/train/quickstart.toml")
INTERVAL = CheckpointConfig().every
Wait = Callable[[], object]


class Block(NamedTuple):
    """Seconds of one block."""

    save: float
    """Until the training goes on."""
    wall: float
    cpu: float
    """Of all threads of the process."""


class Bench:
    """A run between two steps, and the ways to save it."""

    def __init__(self, session: Session, work: Work, stage: RLStage, progress: Progress) -> None:
        self.session, self.work, self.stage, self.progress = session, work, stage, progress
        folder, world = session.cfg.run_dir, session.world
        self.peer_dir = folder / "peer"
        self.savers = {
            name: Saver(folder / name, CheckpointConfig(async_save=beside, keep_last=1), world)
            for name, beside in (("rlpt", True), ("rlpt_waiting", False))
        }
        self.arms: dict[str, Callable[[], Wait]] = {
            "none": lambda: lambda: None,
            "rlpt": lambda: self._ours("rlpt"),
            "rlpt_waiting": lambda: self._ours("rlpt_waiting"),
            "dcp_async": self._dcp_async,
            "dcp_sync": self._dcp_sync,
        }

    def _ours(self, name: str) -> Wait:
        saver = self.savers[name]
        saver.save(self.progress, self.work.parts())
        return saver.settle

    def _dcp_async(self) -> Wait:
        return async_save(state_of(self.work.parts()), checkpoint_id=self._emptied()).result

    def _dcp_sync(self) -> Wait:
        sync_save(state_of(self.work.parts()), checkpoint_id=self._emptied())
        return lambda: None

    def _emptied(self) -> Path:
        shutil.rmtree(self.peer_dir, ignore_errors=True)
        return self.peer_dir

    def block(self, arm: str, steps: int) -> Block:
        wall, cpu = time.perf_counter(), time.process_time()
        wait = self.arms[arm]()
        saved = time.perf_counter() - wall
        for _ in range(steps):
            run_step(self.session, self.work, self.stage, self.progress)
        wait()
        return Block(saved, time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def opened(folder: Path) -> Iterator[Bench]:
    """The quickstart's RL stage at its first step, on documents of random words."""
    words = [f"run_dir='{folder / 'run'}'", f"data.shards='{_shards(folder)}'"]
    words += ["stage.1.steps=100000", "guards.truncation_halt=1.0", "log.rollouts_every=0"]
    cfg = load(RunConfig, QUICKSTART, words)
    shards = open_shards(cfg.data)
    plan = blueprint(cfg.policy, shards, cfg.longest_path, cfg.prompts.frame)
    cfg.run_dir.mkdir()
    with (
        dist.world() as world,
        open_log(cfg, world) as log,
        closing(Session.open(cfg, shards, plan, world, log)) as session,
    ):
        stage = cfg.stage[1]
        assert isinstance(stage, RLStage)
        yield Bench(session, session.begin(stage), stage, Progress())


def _shards(folder: Path) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(4000)]
    (folder / "corpus").mkdir()
    for number in range(600):
        sentences = (" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(20))
        (folder / "corpus" / f"{number}.txt").write_text("\n".join(sentences))
    table = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(folder / "corpus")},
        "tokenizer": {"kind": "bpe", "vocab_size": 4096},
    }
    prepare(parse(PrepareConfig, table, "bench"))
    return folder / "shards"


def measured(bench: Bench, rounds: int, steps: int) -> dict[str, list[Block]]:
    """Blocks of every arm, one a round; the order rotates, and a first round warms up."""
    arms = list(bench.arms)
    blocks: dict[str, list[Block]] = {arm: [] for arm in arms}
    with progress_bar("blocks", len(arms) * (rounds + 1), 0, show=True) as report:
        for number in range(rounds + 1):
            begin = number % len(arms)
            for at, arm in enumerate(arms[begin:] + arms[:begin], 1):
                blocks[arm].append(bench.block(arm, steps))
                report(number * len(arms) + at, f"{arm} {blocks[arm][-1].wall:.2f} s")
    return {arm: found[1:] for arm, found in blocks.items()}


def table(blocks: dict[str, list[Block]], steps: int) -> list[dict[str, object]]:
    """What a save of every arm costs: seconds, and shares of the default interval's steps."""
    none = blocks["none"]
    rows = []
    for arm, found in blocks.items():
        step = {kind: median(getattr(b, kind) for b in none) / steps for kind in ("wall", "cpu")}
        row = {"arm": arm, "blocking_seconds": median(b.save for b in found)}
        row["blocking_share"] = row["blocking_seconds"] / (INTERVAL * step["wall"])
        for kind in ("wall", "cpu"):
            pairs = zip(found, none, strict=True)
            costs = sorted(getattr(b, kind) - getattr(n, kind) for b, n in pairs)
            row |= {
                f"{kind}_seconds": median(costs),
                f"{kind}_seconds_range": [costs[0], costs[-1]],
            }
            row[f"{kind}_share"] = median(costs) / (INTERVAL * step[kind])
        rows.append(row | {"step_seconds": step["wall"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="what a checkpoint costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="after a save, in a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"keep it in {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as bench:
        blocks = measured(bench, options.rounds, options.steps)
        size = sum(f.stat().st_size for f in (bench.session.cfg.run_dir / "rlpt").rglob("*.*"))
        for saver in bench.savers.values():
            saver.close()
    found = {
        "date": date.today().isoformat(),
        "hardware": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "interval_steps": INTERVAL,
        "checkpoint_bytes": size,
        "rounds": options.rounds,
        "steps": options.steps,
        "rows": table(blocks, options.steps),
    }
    for row in found["rows"]:
        print(
            "{arm:14} blocks {blocking_seconds:7.3f} s = {blocking_share:7.3%}   costs {wall_seconds:7.3f} s = "
            "{wall_share:7.3%} of wall time, {cpu_share:7.3%} of processor time".format(**row)
        )
    if options.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
