"""A run folder as plain values, and the list of what is not in it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlpt.rows import Row, journal_row, unzipped
from rlpt_data.strict import UserError, json_of

_OF_A_GROUP = ("step", "document", "context", "continuation_tokens", "rollouts")


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
        config=read_object(run_dir / "config.json", "the configuration", missing),
        environment=read_object(run_dir / "environment.json", "the environment", missing),
        summary=read_object(
            run_dir / "summary.json", "the final numbers (did the run finish?)", missing
        ),
        metrics=_journal(run_dir / "metrics.jsonl", "the curves", ("step",), missing),
        evaluations=_journal(
            run_dir / "evaluations.jsonl", "held-out evaluations", ("step", "summary"), missing
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


def read_object(path: Path, what: str, missing: list[str]) -> Row:
    """A JSON object; empty, and said in ``missing``, where there is none."""
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return {}
    try:
        table = json_of(path.read_bytes())
    except ValueError as error:
        missing.append(f"{path.name}: damaged ({error}), so {what} cannot be shown")
        return {}
    if not isinstance(table, dict):
        missing.append(f"{path.name}: damaged (holds no table), so {what} cannot be shown")
        return {}
    return table


def _journal(path: Path, what: str, keys: Collection[str], missing: list[str]) -> list[Row]:
    if not path.is_file():
        missing.append(f"{path.name}: absent, so {what} cannot be shown")
        return []
    rows = _rows(path.read_bytes().splitlines(), path.name, keys, journal_row, missing)
    if not rows:
        missing.append(f"{path.name}: empty, so {what} cannot be shown")
    return rows


def _rows(
    lines: Iterable[bytes],
    name: str,
    keys: Collection[str],
    row_of: Callable[[bytes], Any],
    missing: list[str],
) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = row_of(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(key in row for key in keys):
            rows.append(row)
        else:
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
    return _rows(text.splitlines(), f"rollouts/{path.name}", _OF_A_GROUP, json_of, missing)


def _trained_on(run_dir: Path) -> Row:
    paths = sorted(run_dir.glob("checkpoints/step_*/progress.json"))
    return read_object(paths[-1], "what the checkpoint knows", []) if paths else {}
