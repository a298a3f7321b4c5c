"""What test_publishing_ranks.py runs under torchrun: a sharded policy, and one fake engine on each rank.

Each rank writes what it found as JSON: publish_on_ranks.py OUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_backend import TOKEN, FakeProcess, specification
from torch.distributed.fsdp import fully_shard

from rlpt import dist
from rlpt.config import ThoughtConfig
from rlpt.policy.load import local, named_full_tensors
from rlpt.rollout import buckets, server, transport
from rlpt.rollout.client import EngineClient
from rlpt.rollout.fleet import Fleet
from rlpt.rollout.live import BroadcastPublisher
from rlpt.rollout.publishing import DirectoryPublisher, Publisher
from rlpt.rollout.seat import Seat
from rlpt.types import Markers

SECONDS = 10.0


class Rank:
    """A policy of two layers, this rank's half of it, and its engine."""

    def __init__(self, world: dist.World, publisher: Callable[[list[Seat]], Publisher]) -> None:
        torch.manual_seed(0)
        self.lm = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 6))
        fully_shard(self.lm, mesh=dist.mesh(world, 1))
        spec = specification(dtype="bfloat16")
        process: Any = FakeProcess(spec)
        client = EngineClient("", TOKEN, f"rank {world.rank}", SECONDS)
        self.process = process
        self.seat = Seat(f"engine {world.rank}", spec, client, process, 5.0, 5)
        process.start()
        self.seat.open()
        self.fleet = Fleet(
            [self.seat], publisher([self.seat]), Markers(95, 96), ThoughtConfig(), 0, world, False
        )
        self.policy: Any = SimpleNamespace(lm=self.lm)

    @torch.no_grad()
    def publish(self, version: int) -> None:
        for parameter in self.lm.parameters():
            local(parameter).add_(1.0)
        self.fleet.publish(named_full_tensors(self.policy), version)

    def differing(self) -> list[str]:
        """Tensors of this rank's engine that are not the trainer's. Collective."""
        held = self.process.now.backend.weights
        wanted = {name: tensor.bfloat16() for name, tensor in named_full_tensors(self.policy)}
        same = held.keys() == wanted.keys()
        return [n for n, t in wanted.items() if not (same and torch.equal(held[n], t))]


def twice(rank: Rank, world: dist.World) -> dict[str, Any]:
    versions, differ, agree = [], [], []
    for version in (1, 2):
        rank.publish(version)
        versions.append(rank.process.now.backend.version)
        differ += rank.differing()
        messages = dist.gathered(rank.seat.weights, world)
        agree.append(messages[0] == messages[1])
    own = sum(local(parameter).numel() for parameter in rank.lm.parameters())
    whole = sum(parameter.numel() for parameter in rank.lm.parameters())
    return {
        "versions": versions, "differ": differ, "messages_agree": all(agree),
        "loads": [call for call in rank.process.now.backend.calls if call.startswith("load")],
        "shards": "half of it" if own * 2 == whole else f"{own} of {whole}",
    }  # fmt: skip


def revived(rank: Rank, world: dist.World) -> dict[str, Any]:
    """The second rank's engine is killed between two publications, while the first rank does something else."""
    if world.rank == 1:
        rank.process.now.die()
        rank.seat.poll(0.0)
    return {"restarts": rank.seat.restarts, "differ": rank.differing()}


def died(rank: Rank, world: dist.World) -> dict[str, Any]:
    """The second rank's engine is killed with the first tensor of a broadcast."""
    now = rank.process.now

    def dies(named, version: int) -> None:
        next(iter(named))
        now.server._receiver.leave()
        now.die()
        raise RuntimeError("killed")

    if world.rank == 1:
        now.backend.load = dies
    rank.publish(3)
    return {"restarts": rank.seat.restarts, "differ": rank.differing()}


def damaged(rank: Rank, world: dist.World) -> str:
    if world.rank == 1:
        rank.process.now.backend.damaged = "1.weight"
    return failure(rank, 4)


def failure(rank: Rank, version: int) -> str:
    try:
        rank.publish(version)
    except RuntimeError as error:
        return str(error)
    return "nothing failed"


def full_disk(rank: Rank) -> str:
    """Rank 0 cannot write, in the middle of the gathering."""

    def write(named, folder: Path) -> list:
        next(named)
        raise OSError("full")

    transport.write_directory = write
    return failure(rank, 3)


def main(out: Path) -> None:
    server._IDLE = 0.02
    buckets.BUCKET_BYTES = 100
    with dist.world() as world:
        files = Rank(world, lambda _: DirectoryPublisher(out / "weights", "bfloat16", world))
        found: dict[str, Any] = {"directory": twice(files, world), "full_disk": full_disk(files)}
        group = Rank(
            world, lambda seats: BroadcastPublisher(seats, "bfloat16", "127.0.0.1", SECONDS, world)
        )
        found |= {"broadcast": twice(group, world), "revived": revived(group, world)}
        found |= {"died": died(group, world), "damaged": damaged(group, world)}
        (out / f"{world.rank}.json").write_text(json.dumps(found))
        dist.barrier(world)
        for rank in (files, group):
            rank.fleet.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
