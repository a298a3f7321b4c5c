"""The trainer's side of a publication: sharded masters -> full tensors, one at a time -> where engines find them."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from rlpt import dist
from rlpt.rollout import transport, wire


@runtime_checkable
class Publisher(Protocol):
    """Collective: every rank calls every method."""

    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> wire.Publish:
        """Make the weights reachable; the message tells engines where, and what they must then have."""
        ...

    def sent(self, version: int) -> None:
        """All engines have them. What a restarted engine needs is kept."""
        ...

    def close(self) -> None: ...


class DirectoryPublisher:
    """Rank 0 writes safetensors files of bounded size; engines read them. Works wherever both see the folder."""

    def __init__(self, folder: Path, dtype: wire.DType, world: dist.World) -> None:
        self.folder = folder
        self.dtype: wire.DType = dtype
        self.world = world

    def send(self, named: Iterable[tuple[str, Tensor]], version: int) -> wire.Publish:
        tensors: list[wire.Tensor] = []
        if self.world.is_main:
            tensors = transport.write_directory(
                transport.cast(named, self.dtype), self._of(version)
            )
        else:
            # The others take part in gathering each tensor, and let go of it.
            for _ in named:
                pass
        tensors = dist.gathered(tensors, self.world)[0]
        place = str(self._of(version).resolve())
        return wire.Publish(
            version=version, transport="directory", place=place, tensors=tuple(tensors)
        )

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
