"""DCP's writer, with the error of the operating system that torch's own would turn into another.

`torch.save` writes through C++, where a full disk ends in "unexpected pos": what the write itself raised is lost. And
torch syncs a file before what its buffer still holds is in it: of a small one nothing.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rlpt.phases import CLOCK


class _File(io.FileIO):
    """Notes what fails in it, and is synced when it is whole."""

    def __init__(self, path: str | os.PathLike[str], mode: str, errors: list[OSError]) -> None:
        super().__init__(path, mode)
        self.errors = errors

    def write(self, data: Any) -> int | None:
        # Training may wait for this save: it is then here that the process goes on.
        CLOCK.beat()
        with self._noted():
            return super().write(data)

    def close(self) -> None:
        try:
            if not self.closed:
                with self._noted():
                    os.fsync(self.fileno())
        finally:
            super().close()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self.name
            self.errors.append(error)
            raise


class _Files(FileSystem):
    def __init__(self) -> None:
        self.errors: list[OSError] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with io.BufferedWriter(_File(path, mode, self.errors)) as stream:
            yield stream


class Writer(FileSystemWriter):
    """Raises OSError, with the file's name, where the operating system could not write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)
        self.fs = _Files()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if self.fs.errors:
                raise self.fs.errors[0] from error
            raise
