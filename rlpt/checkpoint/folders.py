"""What lies in `RUN_DIR/checkpoints`, and which of it is complete.

A folder `step_NNNNNN` without its marker is not a checkpoint. The marker is a manifest: the size and the hash of every
file, written and synced last, before the folder gets its name.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError

from rlpt_data.strict import UserError

MARKER = "COMPLETE"
FORMAT = 2
"""Of the marker. The first one had sizes alone."""
REPLACED = ".replaced"
"""Ending of a complete checkpoint while another of its step takes its name."""
_NAME = re.compile(r"step_\d{6,}")


Counted = Annotated[StrictInt, Field(ge=0, lt=2**53)]


@dataclass
class Progress:
    """Where a run stands. With stateless order and sampling this is all that the data and the engine need."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Counted = 0
    """Optimiser steps done, over all stages: also the version of the weights."""
    stage: Counted = 0
    stage_step: Counted = 0
    cursor: Counted = 0
    """Samples of this stage's order that are consumed."""
    seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Wall time of all sessions of this run."""
    journals: dict[str, Counted] = field(default_factory=dict)
    """Bytes of the run's journals at this point."""
    shards: str = ""
    """Content hash of the shards that the order runs over."""
    tokenizer: str = ""
    """Hash of the tokenizer whose ids the weights know."""


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint, as its manifest has it."""

    bytes: Counted
    blake2b: str | None
    """None in a checkpoint of the first format."""


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, Entry | Counted]
    format: Annotated[int, Field(ge=1, le=FORMAT)] = 1


_MANIFEST = TypeAdapter(_Manifest)
_PROGRESS = TypeAdapter(Progress)


def entry_of(path: Path) -> Entry:
    """Size and hash of a file as it lies there."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return Entry(path.stat().st_size, digest.hexdigest())


def marker_text(entries: Mapping[str, Entry]) -> str:
    files = {name: asdict(entry) for name, entry in sorted(entries.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=1)


def manifest(path: Path) -> dict[str, Entry]:
    """The files of a checkpoint by name. Raises ValueError where its marker is damaged, or names a file elsewhere."""
    try:
        table = _MANIFEST.validate_json((path / MARKER).read_bytes()).files
    except ValidationError as error:
        raise ValueError(f"its {MARKER} marker is damaged") from error
    for name in table:
        # On any system: a name is one part of a path, and what it names lies here.
        plain = not (set(name) & set("/\\\0") or name in ("", ".", ".."))
        if not plain or (path / name).resolve().parent != path.resolve():
            raise ValueError(
                f"its {MARKER} marker names {name!r}, which is not a file of this folder"
            )
    return {
        n: found if isinstance(found, Entry) else Entry(found, None) for n, found in table.items()
    }


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def folders(run_dir: Path) -> list[Path]:
    """All that look like checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def put_aside(path: Path) -> Path:
    """Rename a folder that is no good, so that its step can be saved again; its new name."""
    names = (f"{path.name}.damaged{n or ''}" for n in count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(target)


def mend(run_dir: Path) -> None:
    """Finish what a kill between two renames left: a checkpoint that was to be replaced gets its name back."""
    for path in (run_dir / "checkpoints").glob(f"step_*{REPLACED}"):
        if is_only_one(path):
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)


def is_only_one(path: Path) -> bool:
    """Whether a folder is the checkpoint of its step under the name it has while it is replaced."""
    return path.suffix == REPLACED and not path.with_suffix("").exists()


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first. A folder without a valid marker is named in a warning."""
    for path in incomplete(run_dir):
        warnings.warn(f"{path}: {defect(path)}; it is passed over", stacklevel=2)
    return [step_of(path) for path in folders(run_dir) if defect(path) is None]


def incomplete(run_dir: Path) -> list[Path]:
    """Folders that look like checkpoints and are none."""
    return [path for path in folders(run_dir) if defect(path) is not None]


def defect(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint, as far as names and sizes tell, or None."""
    if not (path / MARKER).is_file():
        return f"no {MARKER} marker: saving was cut short"
    try:
        entries = manifest(path)
    except ValueError as error:
        return str(error)
    for name, entry in entries.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != entry.bytes:
            return f"{name} has {found} bytes, the marker says {entry.bytes}"
    return None


def find(reference: str) -> Path:
    """`RUN_DIR@STEP` or `RUN_DIR@last` -> the folder of a complete checkpoint. Raises UserError."""
    run, _, step = reference.rpartition("@")
    if not run or not (step == "last" or step.isdigit()):
        raise UserError(f"{reference!r}: not a checkpoint; write RUN_DIR@STEP or RUN_DIR@last")
    if step == "last":
        steps = complete_steps(Path(run))
        if not steps:
            raise UserError(f"{run}: no complete checkpoint in its checkpoints folder; train first")
        return path_of(Path(run), steps[-1])
    path = path_of(Path(run), int(step))
    if not path.is_dir():
        known = ", ".join(map(str, complete_steps(Path(run)))) or "none"
        raise UserError(f"{path}: no such checkpoint; complete ones: {known}")
    if (reason := defect(path)) is not None:
        raise UserError(
            f"{path}: {reason}; name another step, or RUN_DIR@last for the newest complete one"
        )
    return path


def read_progress(path: Path) -> Progress:
    """Raises UserError where the record is absent or damaged."""
    record = path / "progress.json"
    try:
        progress = _PROGRESS.validate_json(record.read_bytes())
    except OSError as error:
        raise UserError(f"{record}: {error.strerror}; use another checkpoint") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise UserError(
            f"{record}: damaged: {place}: {first['msg']}; restore it, or use another checkpoint"
        ) from error
    if progress.step != step_of(path):
        raise UserError(f"{record}: says step {progress.step}; use another checkpoint")
    return progress
