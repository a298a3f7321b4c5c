"""Evaluations on disk, without loss: what pairs the two ends of a run after a restart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.records import Record
from rlpt.evaluate.summary import Resampling


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"step_{step:06d}.json.zst"


def save(path: Path, evaluation: Evaluation) -> None:
    """Floats are written so that they read back bit for bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "records": [_plain(asdict(record)) for record in evaluation.records],
        "windows": [asdict(window) for window in evaluation.windows],
        "summary": evaluation.summary,
        "resampling": asdict(evaluation.resampling),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(zstandard.compress(json.dumps(table).encode()))
    temporary.replace(path)


def load(path: Path) -> Evaluation:
    """What `save` wrote."""
    table = json.loads(zstandard.decompress(path.read_bytes()))
    records = [_record(row) for row in table["records"]]
    windows = [WindowRecord(**row) for row in table["windows"]]
    return Evaluation(records, windows, table["summary"], Resampling(**table["resampling"]))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    arrays = {name: value.tolist() for name, value in row.items() if isinstance(value, np.ndarray)}
    return row | arrays | {"logp": {frame: logp.tolist() for frame, logp in row["logp"].items()}}


def _record(row: dict[str, Any]) -> Record:
    table = dict(row)
    for name in ("continuation_ids", "thought_ids"):
        table[name] = np.array(row[name], dtype=np.int64)
    table["logp"] = {
        frame: np.array(values, dtype=np.float32) for frame, values in row["logp"].items()
    }
    return Record(**table)
