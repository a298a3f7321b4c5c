"""Saving beside the training: the state is copied to CPU memory, all else happens in a thread of its own.

The order must not be broken: files, synced -> marker with their hashes, synced -> the folder gets its name -> the
oldest go. A kill at any point leaves the previous checkpoint as the newest complete one.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.utils._pytree import tree_leaves

from rlpt import dist
from rlpt.checkpoint import folders
from rlpt.checkpoint.faults import check_space, faulty, retried
from rlpt.checkpoint.folders import MARKER, Entry, Progress
from rlpt.checkpoint.keeping import dropped
from rlpt.checkpoint.reading import state_of
from rlpt.checkpoint.writing import Writer
from rlpt.console import say
from rlpt.observe import CheckpointConfig


class _Flight(Thread):
    """A save under way. What fails in it waits to be raised by whoever started it."""

    def __init__(self, body: Callable[[], None]) -> None:
        # A process that must end does not wait for it: a save that was cut short leaves no marker.
        super().__init__(name="checkpoint", daemon=True)
        self.body = body
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.body()
        except BaseException as error:
            self.error = error


class Saver:
    """Writes the checkpoints of one run, at most one at a time. All ranks call its methods alike."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, world: dist.World) -> None:
        """Collective."""
        self.run_dir = run_dir
        self.cfg = cfg
        self.world = world
        # Training's collectives go on meanwhile: those of the thread need a group of their own.
        self.beside = dist.beside(world)
        pinned = world.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self.flight: _Flight | None = None

    def save(
        self, progress: Progress, parts: Mapping[str, Any], own: Mapping[str, bytes] | None = None
    ) -> None:
        """Copy ``parts`` (policy, optimizer, ema, ...) and the progress, and have them written. Collective.

        ``own`` are files that this rank alone has, by name. Waits for the save before, and raises what failed in it.
        """
        self.settle()
        self.write(progress, state_of(parts), own)

    def write(
        self, progress: Progress, state: dict[str, Any], own: Mapping[str, bytes] | None = None
    ) -> None:
        """As `save`, of a state as DCP has it; nothing may be in flight. Collective."""
        assert self.flight is None
        staged = self.stager.stage(state)
        record = json.dumps(asdict(progress)).encode()
        files = {**(own or {}), **({"progress.json": record} if self.world.is_main else {})}
        journals = [self.run_dir / name for name, size in progress.journals.items() if size]
        self.flight = _Flight(partial(self._write, progress.step, staged, files, journals))
        self.flight.start()
        if not self.cfg.async_save:
            self.settle()

    def settle(self) -> None:
        """Wait for the save in flight, if there is one. Raises FaultError, on every rank, where it failed on any."""
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.join()
            if flight.error is not None:
                raise flight.error

    def look(self) -> None:
        """Between two steps: raise what failed, on all ranks at the same step, and wait for nothing. Collective."""
        if self.flight is None:
            return
        running = self.flight.is_alive()
        failed = not running and self.flight.error is not None
        running, failed = dist.greatest([float(running), float(failed)], self.world)
        if failed or not running:
            self.settle()

    def close(self) -> None:
        """Wait for the save in flight. What failed in it is said: whoever closes now is ending for another reason."""
        try:
            self.settle()
        except Exception as error:
            say(f"{error}")
        self.stager.close()
        dist.leave(self.beside)

    # ---- in the thread ---------------------------------------------------------------------------

    def _write(
        self, step: int, staged: Any, own: Mapping[str, bytes], journals: Sequence[Path]
    ) -> None:
        final = folders.path_of(self.run_dir, step)
        temporary = final.with_suffix(".tmp")
        together = partial(self._together, temporary)
        needed = _bytes(staged) + sum(dist.gathered(sum(map(len, own.values())), self.beside))
        together(partial(_emptied, temporary), alone=True)
        together(partial(check_space, temporary, needed), alone=True)
        together(partial(_write_files, temporary, own))
        with faulty(temporary):
            retried(lambda: self._write_tensors(temporary, staged))
        # What a checkpoint remembers of the journals must outlast a loss of power as it does.
        together(partial(_sync, *journals), alone=True)
        entries: dict[str, Entry] = {}
        together(lambda: entries.update(self._entries(temporary, own)))
        everyones = dist.gathered(entries, self.beside)
        entries = {name: entry for each in everyones for name, entry in each.items()}
        together(partial(_write_marker, temporary, entries), alone=True)
        together(partial(_name, temporary, final), alone=True)
        together(self._drop_oldest, alone=True)

    def _together(self, path: Path, action: Callable[[], None], alone: bool = False) -> None:
        """Run an action on every rank, or on the main one ``alone``; where one fails all raise. Collective."""

        def body() -> None:
            if not alone or self.world.is_main:
                with faulty(path):
                    retried(action)

        dist.together(body, self.beside)

    def _write_tensors(self, path: Path, staged: Any) -> None:
        """Raises, the same on every rank, what failed on the first of those where anything did. Collective."""
        try:
            dcp_save(staged, storage_writer=Writer(path), process_group=self.beside.group)
        except CheckpointException as error:
            raise error.failures[min(error.failures)][0] from error

    def _entries(self, path: Path, own: Mapping[str, bytes]) -> dict[str, Entry]:
        """Of the files that this rank wrote: DCP puts the rank in front of their names."""
        mine = [*own, *(file.name for file in path.glob(f"__{self.world.rank}_*"))]
        mine += [".metadata"] if self.world.is_main else []
        return {name: folders.entry_of(path / name) for name in mine}

    def _drop_oldest(self) -> None:
        """Those that neither `keep_last` nor `keep_every` keeps."""
        complete = [path for path in folders.folders(self.run_dir) if not folders.defect(path)]
        steps = map(folders.step_of, complete)
        for step in dropped(steps, self.cfg.keep_last, self.cfg.keep_every):
            path = folders.path_of(self.run_dir, step)
            try:
                shutil.rmtree(path)
            except OSError as error:
                # The new one is complete: that an old one stays is no reason to end the run.
                say(f"WARNING: {path}: cannot be removed: {error}; remove it yourself")


def _bytes(staged: Any) -> int:
    """Of all ranks' tensors; a sharded one knows its whole shape."""
    tensors = [leaf for leaf in tree_leaves(staged) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _emptied(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _write_files(path: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with (path / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _write_marker(path: Path, entries: Mapping[str, Entry]) -> None:
    _write_files(path, {MARKER: folders.marker_text(entries).encode()})
    _sync(path)


def _name(temporary: Path, final: Path) -> None:
    """The folder gets its name. One that has it already is replaced if it is complete, and set aside if not."""
    replaced = final.with_suffix(folders.REPLACED)
    # Where only the sync failed, a second try finds it named.
    if temporary.exists():
        if final.exists() and folders.defect(final) is None:
            final.rename(replaced)
        elif final.exists():
            folders.put_aside(final)
        temporary.rename(final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
