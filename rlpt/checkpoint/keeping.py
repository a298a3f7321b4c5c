"""Which checkpoints of a run lie there, whether they are what was saved, and which of them go."""

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rlpt import dist
from rlpt.checkpoint import folders
from rlpt.checkpoint.choosing import damage
from rlpt.checkpoint.metadata import entries
from rlpt.lock import alone
from rlpt_data.strict import UserError

HERE = dist.World(0, 1, torch.device("cpu"))
"""A process that looks at checkpoints and trains nothing."""


def dropped(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """Of complete checkpoints those that neither rule keeps: the newest ``keep_last``, and the multiples of
    ``keep_every`` (0: none)."""
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def listed(run_dir: Path) -> list[dict[str, Any]]:
    """All that lies in a run's checkpoints folder, oldest first. Raises UserError where there is none.

    ``state`` is what names and sizes tell; hashes are read by `verified`.
    """
    return [_row(path) for path in _subfolders(run_dir)]


def _subfolders(run_dir: Path) -> list[Path]:
    """Files and links beside the checkpoints are somebody's own."""
    found = sorted(_folder(run_dir).iterdir())
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _folder(run_dir: Path) -> Path:
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir}: has no checkpoints folder; name the folder of a run")
    return folder


def _row(path: Path) -> dict[str, Any]:
    reason = folders.defect(path) if path in folders.folders(path.parents[1]) else "a leftover"
    row = {"name": path.name, "step": None, "stage": None, "stage_step": None}
    if reason is None:
        try:
            progress = folders.read_progress(path)
            row |= {name: getattr(progress, name) for name in ("step", "stage", "stage_step")}
        except UserError as error:
            reason = str(error)
    age = time.time() - path.stat().st_mtime
    state = "complete" if reason is None else "damaged"
    return row | {"bytes": _size(path), "age_seconds": age, "state": state, "reason": reason}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def verified(reference: str) -> dict[str, list[str]]:
    """What is wrong with the checkpoint `RUN@STEP`, or with every one of `RUN`: folder -> its defects.

    Checks names, sizes, hashes, the progress record, and that every tensor can be read and has the shape and the type
    that the metadata says. Raises UserError where there is nothing to check.
    """
    return {str(path): list(_defects(path)) for path in _named(reference)}


def _named(reference: str) -> list[Path]:
    run, at, step = reference.rpartition("@")
    if not at:
        _folder(Path(reference))
        if not (found := folders.folders(Path(reference))):
            raise UserError(f"{reference}: no checkpoint in its checkpoints folder; train first")
        return found
    path = folders.path_of(Path(run), int(step)) if step.isdigit() else folders.find(reference)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; `rlpt checkpoint list {run}` names them")
    return [path]


def _defects(path: Path) -> Iterator[str]:
    if (reason := folders.defect(path)) is not None:
        yield reason
        return
    if (reason := damage(path, HERE)) is not None:
        yield from reason.split("; ")
        return
    try:
        folders.read_progress(path)
        for _ in entries(path):
            pass
    except UserError as error:
        yield str(error)


def pruned(run_dir: Path, keep_last: int, keep_every: int, dry_run: bool) -> dict[str, Any]:
    """Remove what the rules do not keep, and all folders that are none; what was removed and how many bytes.

    The newest one whose hashes hold stays whatever the rules say. Raises UserError where there is none, or where the
    run is at work.
    """
    _folder(run_dir)
    with alone(run_dir):
        complete = {
            folders.step_of(path): path
            for path in folders.folders(run_dir)
            if folders.defect(path) is None
        }
        newest = next((n for n in sorted(complete)[::-1] if not damage(complete[n], HERE)), None)
        if newest is None:
            raise UserError(f"{run_dir}: has no intact checkpoint; nothing was removed")
        going = set(dropped(complete, keep_last, keep_every)) - {newest}
        kept = {path for step, path in complete.items() if step not in going}
        removed = [path for path in _subfolders(run_dir) if path not in kept]
        removed = [path for path in removed if not folders.is_only_one(path)]
        freed = sum(map(_size, removed))
        for path in [] if dry_run else removed:
            shutil.rmtree(path)
    names = [path.name for path in removed]
    return {"removed": names, "kept": sorted(complete.keys() - going), "bytes": freed}
