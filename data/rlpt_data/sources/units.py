"""Units of reading: a file, a part of a file, or a source that cannot be divided.

A unit is what one worker reads, what the ledger calls done, and what is quarantined when it cannot
be read. Which units there are changes nothing about the shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Unit:
    """What begins in [start, stop) of ``path``; without a path the whole source."""

    name: str
    """Stable between runs: the path below the source, and the range."""
    path: Path | None = None
    start: int = 0
    stop: int | None = None

    @property
    def file(self) -> str:
        """The name without the range."""
        return self.name if self.stop is None else self.name.rpartition("[")[0]


def of_files(root: Path, paths: Sequence[Path], chunk_bytes: int | None = None) -> list[Unit]:
    """One unit a file, or one for every ``chunk_bytes`` of it."""
    found: list[Unit] = []
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        size = path.stat().st_size
        if chunk_bytes is None or size <= chunk_bytes:
            found.append(Unit(name, path))
            continue
        for start in range(0, size, chunk_bytes):
            stop = min(start + chunk_bytes, size)
            found.append(Unit(f"{name}[{start}:{stop}]", path, start, stop))
    return found
