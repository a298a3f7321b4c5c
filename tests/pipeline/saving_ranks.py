"""Two ranks that save while they train, under torchrun; on rank 1 the disk is full at step 2. saving_ranks.py OUT

Each rank writes what it went through into OUT/rank_N.json.
"""

import errno
import json
import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from rlpt import checkpoint, dist
from rlpt.checkpoint import Progress, Saver, saving
from rlpt.exits import FaultError
from rlpt.observe import CheckpointConfig

WRITE = saving._write_files


def full(rank: int):
    def write(path: Path, files) -> None:
        time.sleep(0.2 * (1 + rank))
        if rank == 1 and path.name == "step_000002.tmp":
            raise OSError(errno.ENOSPC, "No space left on device", str(path / "supply_1"))
        WRITE(path, files)

    return write


def trained(saver: Saver, world: dist.World, found: dict) -> None:
    """Steps with a collective each, while a save is under way."""
    for _ in range(200):
        total = dist.total([float(world.rank + 1)], world)
        assert total == [3.0], total
        found["steps"] += 1
        saver.look()
        if saver.flight is None:
            return
        time.sleep(0.01)


def main(out: Path) -> None:
    found = {"steps": 0, "raised": [], "saved": []}
    with dist.world() as world, closing(Saver(out, CheckpointConfig(), world)) as saver:
        saving._write_files = full(world.rank)
        for step in (1, 2, 3):
            state = {"part": {"x": torch.full((4,), float(step))}}
            saver.save(Progress(step=step), state, {f"supply_{world.rank}": bytes(step)})
            try:
                trained(saver, world, found)
            except FaultError as error:
                found["raised"].append([found["steps"], step, str(error)])
        found["saved"] = checkpoint.complete_steps(out)
        (out / f"rank_{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
