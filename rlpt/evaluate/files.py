"""Evaluations on disk, without loss: what pairs the two ends of a run after a restart."""

import json
from dataclasses import asdict
from pathlib import Path

import zstandard

from rlpt.evaluate.evaluation import Evaluation
from rlpt.evaluate.plain import plain, restored
from rlpt.evaluate.quantities import Resampling
from rlpt_data.strict import UserError

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
    temporary.write_bytes(zstandard.compress(json.dumps(table).encode()))
    temporary.replace(path)


def load(path: Path) -> Evaluation:
    """What `save` wrote. Raises UserError for a damaged file, or one of a version whose records had fewer fields."""
    try:
        table = json.loads(zstandard.decompress(path.read_bytes()))
    except (ValueError, zstandard.ZstdError) as error:
        raise UserError(
            f"{path}: damaged: {error}; remove it, an evaluation job makes it again, a run does not"
        ) from error
    if isinstance(table["records"], list):
        raise UserError(
            f"{path}: was written by an earlier version; finish its run with that one, or start over in another folder"
        )
    records, windows = restored(table["records"]), restored(table["windows"])
    return Evaluation(records, windows, table["summary"], Resampling(**table["resampling"]))
