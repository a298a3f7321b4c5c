"""Parts of one evaluation on disk, each whole or not at all: a job that was killed goes on from them.

A folder belongs to one task, which lies in `task.json`; every part carries its hash. Rank 0 reads and writes.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlpt import dist
from rlpt.console import Report
from rlpt.evaluate.files import CLOCK, WHOLE
from rlpt.evaluate.plain import as_written, plain, restored
from rlpt.jobs import Task
from rlpt.rows import unzipped, zipped
from rlpt.runlog import differences, read_config
from rlpt_data.strict import UserError, json_of

T = TypeVar("T")
Shard = tuple[int, int]
"""(number from 1, how many)."""


class Parts:
    """Remembers results by name, for `rlpt.evaluate.continuation.Keep`, and how long each took."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        world: dist.World,
        report: Report = lambda _done, _note: None,
        shard: Shard = (1, 1),
    ) -> None:
        """Claims the folder. Raises UserError where it holds another task, naming the first difference."""
        self.folder = folder / "parts"
        self.key = key_of(task)
        self.world = world
        self.report = report
        self.shard = shard
        self.done = self.turn = 0
        dist.together(lambda: claim(folder, task) if world.is_main else None, world)

    @property
    def finished(self) -> bool:
        """Whether all of it was put together. What was lost of it is made again."""
        names = ("eval.json", "prompts.parquet", WHOLE, CLOCK)
        return all((self.folder.parent / name).is_file() for name in names)

    def __call__(self, name: str, compute: Callable[[], T], /) -> T:
        if name.startswith("records") and not self._mine():
            return []  # pyright: ignore[reportReturnType]
        path = self.folder / f"{name}.json.zst"
        stored = self._read(path) if self.world.is_main and path.exists() else None
        stored = dist.gathered(stored, self.world)[0]
        if stored is None:
            started = time.perf_counter()
            value = compute()
            if self.world.is_main:
                self._write(path, value, time.perf_counter() - started)
        else:
            value = self._value(path, stored)
        self.done += 1
        self.report(self.done, name)
        return value

    def _mine(self) -> bool:
        """Chunks of prompts are dealt to the shards in turn."""
        number, count = self.shard
        self.turn += 1
        return (self.turn - number) % count == 0

    def _value(self, path: Path, stored: dict[str, Any]) -> Any:
        try:
            return restored(stored["value"])
        except ValueError as error:
            raise _damaged(path, error) from error

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            stored = as_written(dict[str, Any], json_of(unzipped(path.read_bytes())))
            if {*stored} != {"task", "seconds", "value"} or not isinstance(
                stored["seconds"], float
            ):
                raise ValueError("holds no part")
        except ValueError as error:
            raise _damaged(path, error) from error
        if stored["task"] != self.key:
            raise UserError(
                f"{path}: is of another task ({stored['task']}, this one is {self.key}); remove it, or put the part "
                "of this job there"
            )
        return stored

    def _write(self, path: Path, value: object, seconds: float) -> None:
        table = {"task": self.key, "seconds": seconds, "value": plain(value)}
        path.parent.mkdir(exist_ok=True)
        _put(path, zipped(json.dumps(table).encode()))

    def seconds(self) -> dict[str, float]:
        """Of every part that is there, by its name, over all sessions of the job."""
        paths = sorted(self.folder.glob("*.json.zst"))
        return {path.name.removesuffix(".json.zst"): self._read(path)["seconds"] for path in paths}

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def _damaged(path: Path, error: ValueError) -> UserError:
    return UserError(f"{path}: damaged: {error}; remove it, it is computed again")


def claim(folder: Path, task: Task) -> None:
    """Make a folder a task's own. Raises UserError where it holds what another task found."""
    path = folder / "task.json"
    table = task.model_dump(mode="json")
    found = any((folder / name).exists() for name in ("parts", "eval.json"))
    if found and not path.is_file():
        raise UserError(
            f"{folder}: holds an evaluation, and no task.json says which; choose another out_dir, or remove that folder"
        )
    if found:
        for key, (old, new) in differences(read_config(path), table).items():
            if not _only_a_place(key):
                raise UserError(
                    f"{folder}: holds an evaluation with {key} = {old!r}, this one has {new!r}; choose another "
                    "out_dir, or remove that folder"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _put(path, json.dumps(table, indent=1).encode())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error}); choose another out_dir"
        ) from error


def _put(path: Path, content: bytes) -> None:
    """Whole or not at all, also where several shards write the same at once."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def key_of(task: Task) -> str:
    """A hash of all that a task's numbers depend on."""
    flat = differences({}, task.model_dump(mode="json"))
    told = {key: new for key, (_, new) in flat.items() if not _only_a_place(key)}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def _only_a_place(key: str) -> bool:
    """Files may move, and a forward may be smaller; what they hold is hashed."""
    return key in ("checkpoint", "policy.path", "evaluation.batch_tokens")
