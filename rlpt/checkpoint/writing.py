"""DCP's writer, with the error of the operating system that torch's own would turn into another.

`torch.save` writes through C++, where a full disk ends in "unexpected pos": what the write itself raised is lost.
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


class _File(io.FileIO):
    """Notes what fails in it."""

    def __init__(self, path: str | os.PathLike[str], mode: str, errors: list[OSError]) -> None:
        super().__init__(path, mode)
        self.errors = errors

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
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
        super().__init__(path)
        self.fs = _Files()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if self.fs.errors:
                raise self.fs.errors[0] from error
            raise
