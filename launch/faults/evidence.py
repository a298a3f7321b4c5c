"""What a finished run left behind, in a form that two runs can be compared in."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlpt import checkpoint
from rlpt.rollout.records import unpacked
from rlpt.runlog import read_journal

MEASURED = ("time/", "throughput/")
"""Metrics of the clock: they differ between any two runs."""


class Evidence(NamedTuple):
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    rollouts: dict[str, str]
    """Hashes of the dumps, without their seconds."""
    positions: list[list[int]]
    """Of the stream, step by step: what was trained."""
    weights: str
    """Hash of the last checkpoint's policy."""


def evidence(run_dir: Path, steps: int) -> Evidence:
    groups = {path.name: _rows(path) for path in sorted((run_dir / "groups").glob("step_*"))}
    dumps = {path.name: _rows(path) for path in sorted((run_dir / "rollouts").glob("step_*"))}
    return Evidence(
        [_timeless(row) for row in read_journal(run_dir / "metrics.jsonl")],
        read_journal(run_dir / "evaluations.jsonl"),
        {name: _hash(rows) for found in (groups, dumps) for name, rows in found.items()},
        [sorted(row["position"] for row in rows) for rows in groups.values()],
        _weights(checkpoint.path_of(run_dir, steps)),
    )


def differences(one: Evidence, other: Evidence) -> list[str]:
    """Names of what is not identical."""
    return [name for name in Evidence._fields if getattr(one, name) != getattr(other, name)]


def far(one: Evidence, other: Evidence, tolerance: float) -> list[str]:
    """What differs where sums may have been added in another order: the same stream, and losses within ``tolerance``
    of each other, relative to 1 or their size."""
    found = [] if one.positions == other.positions else ["positions"]
    if [row["step"] for row in one.metrics] != [row["step"] for row in other.metrics]:
        return [*found, "steps"]
    names = ("loss/next_token", "loss/policy", "reward/mean", "gain/mean")
    for left, right in zip(one.metrics, other.metrics, strict=True):
        found += [
            f"{name} of step {left['step']}: {left[name]} and {right.get(name)}"
            for name in names
            if name in left
            and abs(left[name] - right[name]) > tolerance * max(1.0, abs(left[name]))
        ]
    return found


def doubled_or_lost(positions: list[list[int]]) -> tuple[int, int]:
    """(groups' documents trained twice, positions up to the last one that never were)."""
    flat = [position for step in positions for position in step]
    return len(flat) - len(set(flat)), len(set(range(max(flat, default=-1) + 1)) - set(flat))


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return unpacked(path.read_bytes(), str(path))


def _hash(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _weights(path: Path) -> str:
    """Read by DCP alone, without any model."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in sorted(stored.items())
        if name.startswith("policy.") and isinstance(meta, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
