"""Checkpoints: named stateful parts through DCP, a progress record, and a marker that is written last.

A folder `checkpoints/step_NNNNNN` without its marker is not a checkpoint. Saving writes to a temporary name, then the
marker, then renames: a kill at any point leaves the previous checkpoint as the newest complete one.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from rlpt import dist
from rlpt.policy.policy import Policy
from rlpt_data.strict import UserError

MARKER = "COMPLETE"


@dataclass
class Progress:
    """Where a run stands. With stateless order and sampling this is all that the data and the engine need."""

    step: int = 0
    """Optimiser steps done, over all stages: also the version of the weights."""
    stage: int = 0
    stage_step: int = 0
    cursor: int = 0
    """Samples of this stage's order that are consumed."""
    seconds: float = 0.0
    """Wall time of all sessions of this run."""
    journals: dict[str, int] = field(default_factory=dict)
    """Bytes of the run's journals at this point."""
    shards: str = ""
    """Content hash of the shards that the order runs over."""
    tokenizer: str = ""
    """Hash of the tokenizer whose ids the weights know."""


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first. A folder without a valid marker is named in a warning."""
    steps = []
    for path in sorted((run_dir / "checkpoints").glob("step_??????")):
        reason = defect(path)
        if reason is None:
            steps.append(int(path.name[5:]))
        else:
            warnings.warn(f"{path}: {reason}; it is passed over", stacklevel=2)
    return steps


def incomplete(run_dir: Path) -> list[Path]:
    """Folders that look like checkpoints and are none."""
    return [path for path in sorted((run_dir / "checkpoints").glob("step_??????")) if defect(path)]


def defect(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint, or None."""
    marker = path / MARKER
    if not marker.is_file():
        return f"no {MARKER} marker: saving was cut short"
    try:
        files = json.loads(marker.read_text())["files"]
    except (ValueError, KeyError):
        return f"its {MARKER} marker is damaged"
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} has {found} bytes, the marker says {size}"
    return None


def save(
    run_dir: Path,
    progress: Progress,
    parts: Mapping[str, Any],
    keep_last: int,
    world: dist.World,
    own: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the parts of `parts` (policy, optimizer, ema, ...) and the progress; then drop the oldest checkpoints.

    ``own`` are files that this rank alone has, by name.
    """
    final = path_of(run_dir, progress.step)
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(world)
    for name, data in (own or {}).items():
        (temporary / name).write_bytes(data)
    _quietly(lambda: dcp_save(state_of(parts), checkpoint_id=temporary))
    dist.barrier(world)
    if world.is_main:
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)))
        _mark(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _prune(run_dir, keep_last)
    dist.barrier(world)
    return final


def _mark(path: Path) -> None:
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in path.rglob("*")
        if file.is_file()
    }
    for name in files:
        _sync(path / name)
    (path / MARKER).write_text(json.dumps({"files": files}))
    _sync(path / MARKER)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run_dir: Path, keep_last: int) -> None:
    for step in complete_steps(run_dir)[:-keep_last]:
        shutil.rmtree(path_of(run_dir, step))


def state_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Named parts -> the nested state that DCP reads and writes."""
    state: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Policy):
            state[name] = {key: value.detach() for key, value in part.named_parameters()}
        elif isinstance(part, tuple):
            state[name] = get_optimizer_state_dict(*part)
        else:
            state[name] = part
    return state


def restore(path: Path, parts: Mapping[str, Any]) -> Progress:
    """Read the parts back in place, on any number of ranks."""
    state = state_of(parts)
    _quietly(lambda: dcp_load(state, checkpoint_id=path))
    for name, part in parts.items():
        if isinstance(part, tuple):
            set_optimizer_state_dict(*part, optim_state_dict=state[name])
    if isinstance(rng := state.get("rng"), dict):
        torch.set_rng_state(rng["torch"])
    return read_progress(path)


def files(path: Path, prefix: str) -> list[tuple[str, bytes]]:
    """Files of a checkpoint that single ranks wrote: (path, contents)."""
    return [(str(file), file.read_bytes()) for file in sorted(path.glob(f"{prefix}*"))]


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
    return Progress(**json.loads((path / "progress.json").read_text()))


def check_tokenizer(path: Path, tokenizer: str) -> None:
    """Raises UserError where a checkpoint knows the ids of another tokenizer than that of the given hash."""
    if (known := read_progress(path).tokenizer) != tokenizer:
        raise UserError(
            f"{path}: its tokenizer has hash {known}, the shards' has {tokenizer}; use the shards it was trained on, "
            "or prepare new ones with that run's tokenizer"
        )


def load_weights(path: Path, policy: Policy, tokenizer: str) -> None:
    """The policy's weights alone. Raises UserError where they are another model's or of another tokenizer."""
    check_tokenizer(path, tokenizer)
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, parameter in policy.named_parameters():
        found = getattr(stored.get(f"policy.{name}"), "size", None)
        if found != parameter.shape:
            has = "is absent" if found is None else f"has shape {tuple(found)}"
            raise UserError(
                f"{path}: tensor {name} {has}, this policy needs {tuple(parameter.shape)}; give [policy] the "
                "architecture of the run it starts from"
            )
    restore(path, {"policy": policy})


def _quietly(call: Any) -> None:
    with warnings.catch_warnings():
        # DCP warns of its own deprecated internals and of running without several ranks.
        warnings.simplefilter("ignore")
        call()
