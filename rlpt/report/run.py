"""A run folder as plain values, and the list of what is not in it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlpt.report.shapes import CONFIG, ENVIRONMENT, EVALUATION, GROUP, SUMMARY
from rlpt.rows import Row, fitting, is_beyond, journal_row, unzipped
from rlpt_data.strict import UserError, json_of


@dataclass(frozen=True)
class Run:
    """Everything the report draws from. ``missing`` holds one sentence for every piece that is
    absent or damaged.
    """

    path: Path
    name: str
    config: Row
    environment: Row
    summary: Row
    metrics: list[Row]
    evaluations: list[Row]
    rollouts: list[Row]
    """The groups of all dumps, in the order of their steps."""
    trained_on: Row
    """Of the newest checkpoint: the hashes of its shards and tokenizer; empty where there is none."""
    missing: list[str] = field(default_factory=list)

    @property
    def last_evaluation(self) -> Row:
        """The summary of the last evaluation, empty where there is none."""
        return self.evaluations[-1]["summary"] if self.evaluations else {}


def read_all(run_dirs: Sequence[Path]) -> list[Run]:
    """Every run, under names that tell them apart. Raises UserError for a folder given twice."""
    paths = [path.resolve() for path in run_dirs]
    if twice := [str(path) for path in run_dirs if paths.count(path.resolve()) > 1]:
        raise UserError(f"{twice[0]}: given twice; name every run once")
    return [read(path, name) for path, name in zip(run_dirs, labels(paths), strict=True)]


def labels(paths: Sequence[Path]) -> list[str]:
    """The parts of each path that tell it from the others: of ``a/rlp/s0`` and ``a/rpt/s0`` rlp and
    rpt. Of one path its last part.
    """
    if len(paths) == 1:
        return [paths[0].name]
    parts = [path.parts for path in paths]
    head = _shared(parts)
    tail = _shared([own[head:][::-1] for own in parts])
    middle = ["/".join(own[head : len(own) - tail]) for own in parts]
    # One path may be the beginning of another: then the ends are what differs.
    return middle if all(middle) else ["/".join(own[head - 1 :]) for own in parts]


def _shared(rows: Sequence[tuple[str, ...]]) -> int:
    """How many first parts all rows have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def read(run_dir: Path, name: str | None = None) -> Run:
    """Read what is there. Raises UserError where nothing of a run is."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the run_dir of a configuration")
    missing: list[str] = []
    run = Run(
        path=run_dir,
        name=name or run_dir.resolve().name,
        config=read_object(run_dir / "config.json", "the configuration", missing, CONFIG),
        environment=read_object(
            run_dir / "environment.json", "the environment", missing, ENVIRONMENT
        ),
        summary=read_object(
            run_dir / "summary.json", "the final numbers (did the run finish?)", missing, SUMMARY
        ),
        metrics=_journal(run_dir / "metrics.jsonl", "the curves", metrics_row, missing),
        evaluations=_journal(
            run_dir / "evaluations.jsonl", "held-out evaluations", evaluation_row, missing
        ),
        rollouts=_dumps(run_dir / "rollouts", missing),
        trained_on=_trained_on(run_dir),
        missing=missing,
    )
    if not (run.config or run.metrics or run.summary or run.evaluations):
        raise UserError(
            f"{run_dir}: no run here (no config.json, metrics.jsonl or summary.json); "
            "run `rlpt train`"
        )
    return run


def read_object(
    path: Path, what: str, missing: list[str], shape: dict[str, Any] | None = None
) -> Row:
    """A JSON object of a shape; empty, and said in ``missing``, where there is none."""
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return {}
    try:
        return fitting(json_of(path.read_bytes()), shape or {})
    except ValueError as error:
        missing.append(f"{path.name}: damaged ({error}), so {what} cannot be shown")
        return {}


def _journal(
    path: Path, what: str, row_of: Callable[[bytes], Row], missing: list[str]
) -> list[Row]:
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return []
    rows = _rows(path.read_bytes().splitlines(), path.name, row_of, missing)
    if not rows:
        missing.append(f"{path.name}: empty, so {what} cannot be shown")
    return rows


def metrics_row(line: bytes) -> Row:
    """A line of metrics.jsonl; what no axis holds is infinite. Raises ValueError for what is none."""
    row = journal_row(line)
    return {
        name: math.copysign(math.inf, value) if is_beyond(value) else value
        for name, value in row.items()
    }


def evaluation_row(line: bytes) -> Row:
    """A line of evaluations.jsonl. Raises ValueError for what is none."""
    return fitting(journal_row(line), EVALUATION)


def _rows(
    lines: Iterable[bytes], name: str, row_of: Callable[[bytes], Row], missing: list[str]
) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(row_of(line))
        except ValueError:
            missing.append(f"{name}: line {number} is damaged and left out")
    return rows


def _dumps(folder: Path, missing: list[str]) -> list[Row]:
    paths = sorted(folder.glob("step_*.jsonl.zst"))
    if not paths:
        missing.append("rollouts/: no dump, so no thoughts can be shown (log.rollouts_every)")
    return [row for path in paths for row in read_dump(path, missing)]


def read_dump(path: Path, missing: list[str]) -> list[Row]:
    """The groups of one dump; a damaged one has none, and is said in ``missing``."""
    try:
        text = unzipped(path.read_bytes())
    except ValueError as error:
        missing.append(f"rollouts/{path.name}: damaged ({error}) and left out")
        return []
    name, lines = f"rollouts/{path.name}", text.splitlines()
    return _rows(lines, name, lambda line: fitting(json_of(line), GROUP), missing)


def _trained_on(run_dir: Path) -> Row:
    paths = sorted(run_dir.glob("checkpoints/step_*/progress.json"))
    return read_object(paths[-1], "what the checkpoint knows", []) if paths else {}
