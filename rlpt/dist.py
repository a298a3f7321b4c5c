"""Ranks: the process group, the device mesh and the few collectives the pipeline uses.

One code path serves 1 rank and many: without torchrun a group of one is made in memory, without sockets.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import PrefixStore, ProcessGroup, Store, distributed_c10d, rendezvous
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlpt.exits import FaultError
from rlpt.phases import CLOCK
from rlpt_data.strict import UserError

_PATIENCE = timedelta(hours=2)
"""How long one rank may write to a slow file system while the others wait for it beside the training."""
_STORE_PATIENCE = timedelta(seconds=5)


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    group: ProcessGroup | None = None
    """Whose collectives these are; None: training's."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the process group that torchrun describes, or make a group of one."""
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    owned = not torch_dist.is_initialized()
    if owned and "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://"))
        torch_dist.init_process_group(backend, store=_unused(store), rank=rank, world_size=size)
    elif owned:
        torch_dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield World(torch_dist.get_rank(), torch_dist.get_world_size(), device)
    finally:
        if owned:
            torch_dist.destroy_process_group()


def _unused(store: Store) -> Store:
    """torchrun keeps its store when it starts the ranks again, with the addresses of those that are gone in it
    (pytorch issue 135712). Restarts are counted alike only on one machine; of several, launch/train.sh has torchrun
    give each attempt a store of its own.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def beside(world: World) -> World:
    """The same ranks with a group of their own, on CPUs: for a thread that runs beside the training. Collective."""
    group = torch_dist.new_group(timeout=_PATIENCE, backend="gloo")
    return replace(world, device=torch.device("cpu"), group=group)


def leave(world: World) -> None:
    """Give a group from `beside` back."""
    torch_dist.destroy_process_group(world.group)


def own_store(world: World) -> Store | None:
    """The store that the process group met at, through a connection that a thread has for itself; None for one rank.

    Its calls raise RuntimeError where nobody answers for a few seconds.
    """
    if world.size == 1:
        return None
    # torch's own types do not know of `clone`.
    store: Store = distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
    store.set_timeout(_STORE_PATIENCE)
    return PrefixStore("watchdog", store)


def _come(world: World) -> None:
    """Of the collectives of training: those beside it have an order of their own."""
    if world.group is None:
        CLOCK.enter()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def mesh(world: World, replicas: int) -> DeviceMesh:
    """A one-axis mesh (FSDP), or (replicas, shards) for HSDP."""
    if world.size % replicas:
        raise UserError(
            f"policy.replicas = {replicas}: must divide the number of ranks, {world.size}"
        )
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replica", "shard")
    )


def share(items: Sequence[Any], world: World) -> list[Any]:
    """This rank's strided share of the global list."""
    return list(items[world.rank :: world.size])


def total(values: Sequence[float], world: World) -> list[float]:
    """Sums over ranks, in float64, the same on every rank."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=world.device)
    if world.size > 1:
        _come(world)
        torch_dist.all_reduce(tensor, group=world.group)
    return tensor.tolist()


def largest(value: int, world: World) -> int:
    """The maximum over ranks."""
    tensor = torch.tensor(value, dtype=torch.int64, device=world.device)
    if world.size > 1:
        _come(world)
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX, group=world.group)
    return int(tensor)


def greatest(values: Sequence[float], world: World) -> list[float]:
    """Maxima over ranks, in float64, the same on every rank."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=world.device)
    if world.size > 1:
        _come(world)
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX, group=world.group)
    return tensor.tolist()


def balanced(costs: Sequence[int], world: World) -> list[int]:
    """This rank's positions of a list that every rank knows: as many on every rank, and about the same cost.

    Dealt from the dearest down, forth and back over the ranks.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    rounds = [order[i : i + world.size] for i in range(0, len(order), world.size)]
    dealt = [each if turn % 2 == 0 else each[::-1] for turn, each in enumerate(rounds)]
    return sorted(each[world.rank] for each in dealt)


def unshare(parts: Sequence[Any], world: World) -> list[Any]:
    """Gather strided shares back into the global order: the inverse of `share`."""
    everyones = gathered(list(parts), world)
    count = sum(len(part) for part in everyones)
    return [everyones[i % world.size][i // world.size] for i in range(count)]


def gathered(item: Any, world: World) -> list[Any]:
    """Every rank's item, in the order of the ranks."""
    if world.size == 1:
        return [item]
    _come(world)
    everyones: list[Any] = [None] * world.size
    torch_dist.all_gather_object(everyones, item, group=world.group)
    return everyones


def barrier(world: World) -> None:
    if world.size > 1:
        _come(world)
        torch_dist.barrier(group=world.group)


def together(action: Callable[[], None], world: World) -> None:
    """Run an action on every rank; where one fails all raise and name it: nobody waits for the fallen. Collective."""
    problem: tuple[bool, str] | None = None
    try:
        action()
    except Exception as error:
        if world.size == 1:
            raise
        known = isinstance(error, UserError | FaultError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        problem = (isinstance(error, UserError), text)
    for rank, found in enumerate(gathered(problem, world)):
        if found is not None:
            mistake, text = found
            raise (UserError if mistake else FaultError)(f"rank {rank}: {text}")
