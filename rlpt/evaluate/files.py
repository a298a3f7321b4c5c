"""Evaluations on disk, without loss: what pairs the two ends of a run after a restart."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpt.evaluate.bits_per_byte import WindowRecord
from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.plain import as_written, made, plain, restored
from rlpt.evaluate.quantities import Resampling
from rlpt.evaluate.records import Record
from rlpt.rows import unzipped, zipped
from rlpt_data.strict import UserError, json_of

WHOLE, CLOCK = "evaluation.json.zst", "seconds.json"
"""Of a job's evaluation: all of it, and what every part of it took."""


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"step_{step:06d}.json.zst"


def save(path: Path, evaluation: Evaluation) -> None:
    """Floats are written so that they read back bit for bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "records": plain(evaluation.records),
        "windows": plain(evaluation.windows),
        "summary": evaluation.summary,
        "resampling": asdict(evaluation.resampling),
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(zipped(json.dumps(table).encode()))
        # The journal that names it outlasts a loss of power: a run that goes on reads it.
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> Evaluation:
    """What `save` wrote. Raises UserError for a damaged or absent file, or one of a version whose records had fewer
    fields."""
    try:
        table = json_of(unzipped(path.read_bytes()))
        if isinstance(table, dict) and isinstance(table.get("records"), list):
            raise UserError(
                f"{path}: was written by an earlier version; finish its run with that one, or start over in another "
                "folder"
            )
        return _evaluation(table)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: is gone, and its journal has it; restore it, or move the newer checkpoints of its run away to go "
            "on from one before it"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: damaged: {error}; remove it, an evaluation job makes it again, a run does not"
        ) from error


def _evaluation(table: Any) -> Evaluation:
    """Raises ValueError for what `save` did not write."""
    if not isinstance(table, dict) or {*table} != {"records", "windows", "summary", "resampling"}:
        raise ValueError("holds no evaluation")
    records = as_written(list[Record], restored(table["records"]))
    windows = as_written(list[WindowRecord], restored(table["windows"]))
    summary = as_written(dict[str, Any], table["summary"])
    resampling = made(Resampling, as_written(dict[str, Any], table["resampling"]))
    return Evaluation(records, windows, summary, resampling)
