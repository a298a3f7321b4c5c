"""The trainer's side of a publication: sharded masters -> full tensors, one at a time -> where engines find them.

Every rank iterates to the end, whatever happens on one of them: each tensor is gathered by all. What fails on a rank,
or at an engine, fails on all ranks, by name. Only rank 0 holds more than a tensor (with ipc: every rank a bucket).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from rlpt import dist
from rlpt.rollout import transport, wire
from rlpt.rollout.buckets import cast

Named = Iterable[tuple[str, Tensor]]


@runtime_checkable
class Publisher(Protocol):
    """Collective: every rank calls every method."""

    @property
    def answered(self) -> Mapping[str, dict[str, int]]:
        """Engines of this rank that have the weights with `send` already: their checksums, by the seat's name."""
        ...

    def send(self, named: Named, version: int) -> wire.Publish:
        """Make the weights reachable until the next `send`; the message tells any engine where, and what they are."""
        ...

    def sent(self, version: int) -> None:
        """All engines have them. What a restarted engine needs is kept."""
        ...

    def close(self) -> None: ...


def use_up(named: Named, use: Callable[[Iterator[tuple[str, Tensor]]], None]) -> Exception | None:
    """Pass the tensors to ``use``, and iterate over the rest where it fails: the other ranks wait at every tensor."""
    rest = iter(named)
    problem = None
    try:
        use(rest)
    except Exception as error:
        problem = error
    for _ in rest:
        pass
    return problem


def raise_together(problem: Exception | None, world: dist.World) -> None:
    def again() -> None:
        if problem is not None:
            raise problem

    dist.together(again, world)


class DirectoryPublisher:
    """Rank 0 writes safetensors files of bounded size; engines read them. Works wherever both see the folder."""

    def __init__(self, folder: Path, dtype: wire.DType, world: dist.World) -> None:
        self.folder = folder
        self.dtype: wire.DType = dtype
        self.world = world
        self.answered: dict[str, dict[str, int]] = {}

    def send(self, named: Named, version: int) -> wire.Publish:
        tensors: list[wire.Tensor] = []

        def write(rest: Iterator[tuple[str, Tensor]]) -> None:
            if self.world.is_main:
                of = cast(rest, self.dtype)
                tensors.extend(transport.write_directory(of, self._of(version)))

        raise_together(use_up(named, write), self.world)
        place = str(self._of(version).resolve())
        known = tuple(dist.gathered(tensors, self.world)[0])
        return wire.Publish(version=version, transport="directory", place=place, tensors=known)

    def _of(self, version: int) -> Path:
        return self.folder / f"version_{version:06d}"

    def sent(self, version: int) -> None:
        if self.world.is_main:
            for path in self.folder.glob("version_*"):
                if path != self._of(version):
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
