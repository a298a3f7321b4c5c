"""Compute and value, point by point: run folders, ladders of checkpoints and tables in, curves out.

A run's values are any number of its evaluations (``gain_heldout.mean``), of its held-out questions or of its
`metrics.jsonl` (``reward/mean``), rows as they are. Its compute is `rlpt.compute`'s, counted from where its first stage
of thinking begins: what made the weights it starts from is another law's.
"""

import csv
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlpt.rows import TEXT, Row, fitting, journal_row
from rlpt_data.strict import UserError, json_of

Numbers = dict[str, float]
AXES = ("steps", "tokens", "flops", "seconds")
"""What a run's compute is counted in."""
_JOURNALS = ("evaluations.jsonl", "answers.jsonl", "metrics.jsonl")
_SIDE = 1.959963984540054


@dataclass(frozen=True)
class Curve:
    """All finite points of one source, by growing compute."""

    name: str
    compute_N: Float[np.ndarray, " N"]
    value_N: Float[np.ndarray, " N"]
    sd_N: Float[np.ndarray, " N"] | None
    """From the 95% intervals of the values; None where one has none."""
    not_finite: int
    """Points that were no number, and were dropped."""
    note: str
    """What was counted from where."""


@dataclass(frozen=True)
class Place:
    """One point as it was read."""

    compute: float
    value: float
    low: float
    high: float


def read(source: Path, x: str, y: str, from_step: int | None) -> Curve:
    """The curve of a run folder, of a `ladder.json` or of a CSV file with a header. Raises UserError for any other."""
    if source.suffix == ".csv" and source.is_file():
        return _curve(source.stem, _table(source, x, y), "")
    if source.suffix == ".json" and source.is_file():
        return _curve(source.parent.name, _ladder(source, x, y), "")
    if not source.is_dir():
        raise UserError(
            f"{source}: no such run, ladder or table; give a run folder, a ladder.json or a .csv"
        )
    return _run(source, x, y, from_step)


def flattened(table: Mapping[str, Any], prefix: str = "") -> Numbers:
    """Every number in nested tables under its dotted name; what is empty is not a number, NaN."""
    found: Numbers = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flattened(value, f"{name}.")
        elif value is None:
            found[name] = math.nan
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


# ---- sources -------------------------------------------------------------------------------------


def _run(run_dir: Path, x: str, y: str, from_step: int | None) -> Curve:
    if x not in AXES:
        raise UserError(f"--x {x}: the compute of a run is in {', '.join(AXES[:-1])} or {AXES[-1]}")
    journals = {name: _journal(run_dir / name) for name in _JOURNALS}
    if not any(journals.values()):
        raise UserError(f"{run_dir}: no run here ({' and '.join(_JOURNALS)} are absent); name one")
    start, note = _start(run_dir, journals["metrics.jsonl"], from_step)
    journal, rows = _rows_with(journals, y, run_dir)
    # An evaluation at the start is the value before any compute; a step's metrics come after it.
    first = start + (journal == "metrics.jsonl")
    later = [(row["step"], numbers) for row, numbers in rows if row["step"] >= first]
    if not later:
        raise UserError(f"{run_dir}: no {y} from step {first} on; lower --from-step")
    compute = _compute(run_dir, x, start, [step for step, _ in later])
    places = [_place(compute[step], numbers, y) for step, numbers in later]
    return _curve(run_dir.name, places, note)


def _rows_with(
    journals: Mapping[str, Sequence[Row]], y: str, run_dir: Path
) -> tuple[str, list[tuple[Row, Numbers]]]:
    """The first journal that knows the metric, and its rows that have it."""
    known: set[str] = set()
    for journal, rows in journals.items():
        flat = [(row, flattened(row.get("summary", row))) for row in rows]
        names = {name for _, numbers in flat for name in numbers} - {"step"}
        if _column(y, names):
            return journal, [(row, numbers) for row, numbers in flat if _column(y, numbers)]
        known |= names
    without = "" if journals[_JOURNALS[0]] else " it has no evaluations;"
    raise UserError(f"{run_dir}: --y {y}: no such number;{without} {near(y, known)}")


def _column(y: str, names: Iterable[str]) -> str | None:
    """The name itself, or the mean of the interval with this name."""
    return next((name for name in (y, f"{y}.mean") if name in names), None)


def _start(run_dir: Path, metrics: Sequence[Row], from_step: int | None) -> tuple[int, str]:
    """(the step compute is counted from, how to say it): the first stage that is not next-token learning, or 0."""
    if from_step is not None:
        return from_step, f"compute counted from step {from_step}"
    thinking: set[str] = set()
    if (run_dir / "config.json").is_file():
        config = _json(run_dir / "config.json", {"stage": [{"name!": TEXT, "kind!": TEXT}]})
        stages = config.get("stage") or []
        thinking = {stage["name"] for stage in stages if stage["kind"] != "next_token"}
    begun = min((row["step"] - 1 for row in metrics if row["stage"] in thinking), default=0)
    stage = next((row["stage"] for row in metrics if row["step"] == begun + 1), None)
    return begun, f"compute counted from step {begun}, where {stage} begins" if begun else ""


def _compute(run_dir: Path, x: str, start: int, steps: Sequence[int]) -> dict[int, float]:
    """step -> what was spent after ``start``."""
    if x == "steps":
        return {step: float(step - start) for step in steps}
    # torch comes with it.
    from rlpt.compute import cumulative_costs

    spent = cumulative_costs(run_dir, flops=x == "flops")
    unknown = [step for step in (start, *steps) if step not in spent]
    if unknown:
        raise UserError(
            f"{run_dir / 'metrics.jsonl'}: no step {unknown[0]}; use --x steps, or restore the file"
        )
    amounts = {step: float(getattr(spent[step], x) - getattr(spent[start], x)) for step in steps}
    if steps and not max(amounts.values()) > 0:
        raise UserError(
            f"{run_dir / 'metrics.jsonl'}: it has no {x}; use another --x, such as steps"
        )
    return amounts


def _ladder(path: Path, x: str, y: str) -> list[Place]:
    """Rungs of `rlpt eval`: training compute by its axis, or any number of a rung (``thinking.flops``)."""
    rungs = _json(path, {"rungs": [{}]}).get("rungs")
    if not rungs:
        raise UserError(f"{path}: no ladder of `rlpt eval`; give the ladder.json of one")
    compute = f"training.{x}" if x in AXES else x
    rows = [flattened(rung) for rung in rungs]
    return _columns(str(path), rows, compute, y)


def _table(path: Path, x: str, y: str) -> list[Place]:
    """Rows of a CSV file; a cell without a number is NaN. Columns ``ci_low`` and ``ci_high`` are the interval's."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_cells(file, path, x, y))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no table in UTF-8: {error}; convert it") from error
    return _columns(str(path), rows, x, y)


def _cells(lines: Iterable[str], path: Path, x: str, y: str) -> Iterator[Numbers]:
    """What a row has of the two columns and of the interval."""
    reader = csv.DictReader(lines)
    names = list(reader.fieldnames or [])
    for option, name in (("x", x), ("y", y)):
        if name not in names:
            raise UserError(
                f"{path}: --{option} {name}: no such column; columns: {', '.join(names) or 'none'}"
            )
    base = y.removesuffix(".mean")
    columns = {x: x, y: y, f"{base}.ci_low": "ci_low", f"{base}.ci_high": "ci_high"}
    for row in reader:
        line = reader.line_num
        yield {name: _number(row.get(column), path, line) for name, column in columns.items()}


def _columns(where: str, rows: Sequence[Numbers], x: str, y: str) -> list[Place]:
    names = {name for row in rows for name in row}
    for option, name in (("x", x), ("y", y)):
        if _column(name, names) is None:
            raise UserError(f"{where}: --{option} {name}: no such number; {near(name, names)}")
    return [_place(row.get(x, math.nan), row, y) for row in rows]


# ---- reading -------------------------------------------------------------------------------------


def _place(compute: float, numbers: Numbers, y: str) -> Place:
    name = _column(y, numbers) or y
    base = name.removesuffix(".mean")
    # A metric of a journal is flat: rlvr/accuracy has rlvr/accuracy_ci_low.
    low, high = (
        numbers.get(f"{base}.{end}", numbers.get(f"{base}_{end}", math.nan))
        for end in ("ci_low", "ci_high")
    )
    return Place(compute, numbers.get(name, math.nan), low, high)


def _curve(name: str, places: Sequence[Place], note: str) -> Curve:
    finite = [p for p in places if math.isfinite(p.compute) and math.isfinite(p.value)]
    finite.sort(key=lambda place: place.compute)
    if finite and finite[0].compute < 0:
        raise UserError(
            f"{name}: a point at {finite[0].compute:g}: compute is never negative; correct it"
        )
    sd_N = np.array([(place.high - place.low) / (2 * _SIDE) for place in finite])
    return Curve(
        name,
        np.array([place.compute for place in finite]),
        np.array([place.value for place in finite]),
        sd_N if np.isfinite(sd_N).all() and (sd_N > 0).all() else None,
        len(places) - len(finite),
        note,
    )


def _number(cell: str | None, path: Path, line: int) -> float:
    if cell is None or not cell.strip():
        return math.nan
    try:
        return float(cell)
    except ValueError as error:
        raise UserError(
            f"{path}, line {line}: {cell!r} is not a number; correct it, or leave it empty"
        ) from error


def _journal(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [_parsed(line, f"{path}, line {number}", journal_row) for number, line in lines]


def _json(path: Path, shape: dict[str, Any]) -> Row:
    return _parsed(path.read_bytes(), str(path), lambda text: fitting(json_of(text), shape))


def _parsed(text: bytes, where: str, row_of: Callable[[bytes], Any]) -> Row:
    try:
        table = row_of(text)
    except ValueError as error:
        raise UserError(f"{where}: damaged: {error}; remove or restore it") from error
    if not isinstance(table, dict):
        raise UserError(f"{where}: damaged: holds no table; remove or restore it")
    return table


def near(name: str, known: Iterable[str]) -> str:
    """The names that look most like a mistyped one, or what there is."""
    names = sorted(known)
    inside = sorted(
        (other for other in names if name in other), key=lambda other: not other.endswith(".mean")
    )
    alike = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    found = list(dict.fromkeys([*alike, *inside]))[:5]
    if found:
        return f"nearest: {', '.join(found)}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"valid: {', '.join(names[:8]) or 'none'}{more}"
