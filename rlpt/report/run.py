"""A run folder as plain values, and the list of what is not in it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from rlpt_data.strict import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything the report draws from. ``missing`` holds one sentence for every piece that is
    absent or damaged.
    """

    name: str
    config: Row
    environment: Row
    summary: Row
    metrics: list[Row]
    evaluations: list[Row]
    rollouts: list[list[Row]]
    """The groups of the first and of the last dump; one list where there is one dump."""
    missing: list[str] = field(default_factory=list)

    @property
    def last_evaluation(self) -> Row:
        """The summary of the last evaluation, empty where there is none."""
        return self.evaluations[-1]["summary"] if self.evaluations else {}


def read(run_dir: Path) -> Run:
    """Read what is there. Raises UserError where nothing of a run is."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the run_dir of a configuration")
    missing: list[str] = []
    run = Run(
        name=run_dir.resolve().name,
        config=_object(run_dir / "config.json", "the configuration", missing),
        environment=_object(run_dir / "environment.json", "the environment", missing),
        summary=_object(
            run_dir / "summary.json", "the final numbers (did the run finish?)", missing
        ),
        metrics=_journal(run_dir / "metrics.jsonl", "the curves", missing),
        evaluations=_journal(run_dir / "evaluations.jsonl", "held-out evaluations", missing),
        rollouts=_dumps(run_dir / "rollouts", missing),
        missing=missing,
    )
    if not (run.config or run.metrics or run.summary or run.evaluations):
        raise UserError(
            f"{run_dir}: no run here (no config.json, metrics.jsonl or summary.json); "
            "run `rlpt train`"
        )
    return run


def _object(path: Path, what: str, missing: list[str]) -> Row:
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"{path.name}: damaged ({error}), so {what} cannot be shown")
        return {}
    return table if isinstance(table, dict) else {}


def _journal(path: Path, what: str, missing: list[str]) -> list[Row]:
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return []
    rows = _rows(path.read_text(encoding="utf-8").splitlines(), path.name, missing)
    if not rows:
        missing.append(f"{path.name}: empty, so {what} cannot be shown")
    return rows


def _rows(lines: Iterable[str], name: str, missing: list[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            missing.append(f"{name}: line {number} is damaged and left out")
    return rows


def _dumps(folder: Path, missing: list[str]) -> list[list[Row]]:
    paths = sorted(folder.glob("step_*.jsonl.zst"))
    if not paths:
        missing.append("rollouts/: no dump, so no thoughts can be shown (log.rollouts_every)")
    return [
        rows for path in dict.fromkeys(paths[:1] + paths[-1:]) if (rows := _dump(path, missing))
    ]


def _dump(path: Path, missing: list[str]) -> list[Row]:
    try:
        with path.open("rb") as file:
            text = (
                zstandard.ZstdDecompressor()
                .stream_reader(file, read_across_frames=True)
                .read()
                .decode()
            )
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        missing.append(f"rollouts/{path.name}: damaged ({error}) and left out")
        return []
    return _rows(text.splitlines(), f"rollouts/{path.name}", missing)
