"""Several runs in one table: every figure as its run states it, nothing paired that was not."""

from collections.abc import Sequence
from itertools import compress

from rlpt.report.results import accuracy
from rlpt.report.run import Row, Run
from rlpt.report.words import CONTROLS, duration, interval, number, signed, verdict

COLUMNS = (
    "gain",
    "change",
    "gain of the marginal",
    "bits per byte",
    "accuracy, no thought",
    "accuracy, thought",
    "questions right",
    "thought length",
    "empty",
    "steps",
    "time",
)
RIVALS = tuple(name for name in CONTROLS if name != "own")


def table(runs: Sequence[Run]) -> list[Row]:
    """Name, verdict and a cell for each of COLUMNS, run by run."""
    return [{"name": run.name, "label": verdict(run)[0], "cells": _cells(run)} for run in runs]


def measured(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """COLUMNS and the rows of `table`, without the columns that no run has anything for."""
    cells = [row["cells"] for row in rows]
    kept = [any(cell != number(None) for cell in column) for column in zip(*cells, strict=True)]
    slim = [row | {"cells": [*compress(row["cells"], kept)]} for row in rows]
    return [*compress(COLUMNS, kept)], slim


def _cells(run: Run) -> list[str]:
    last, summary = run.last_evaluation, run.summary
    gain, thought = last.get("gain_heldout") or {}, last.get("thought") or {}
    return [
        interval(gain),
        interval(summary.get("gain_change")),
        signed(gain.get("marginal_n")),
        interval(last.get("bits_per_byte"), sign=False),
        number(last.get("next_token_accuracy_no_think")),
        number(last.get("next_token_accuracy_thought")),
        accuracy(summary.get("rlvr") or {}, "after"),
        number(thought.get("mean_len"), 1),
        number(thought.get("empty_rate")),
        number(summary.get("steps")),
        duration(summary.get("wall_seconds")),
    ]


def controls(runs: Sequence[Run]) -> list[tuple[str, list[str], list[str]]]:
    """(run, own minus each of RIVALS, the checks); empty where no run measured any."""
    rows = []
    for run in runs:
        measured = run.last_evaluation.get("controls") or {}
        cells = [interval((measured.get(name) or {}).get("own_minus_control")) for name in RIVALS]
        rows.append((run.name, cells, _checks(run.last_evaluation)))
    return rows if any(run.last_evaluation.get("controls") for run in runs) else []


def _checks(last: Row) -> list[str]:
    said = []
    for name, title in (("null", "null"), ("wrong_target", "wrong target"), ("leak", "leak")):
        found = last.get(name)
        state = "not measured" if not found else "passed" if found["passes"] else "FAILED"
        said.append(f"{title} {state}")
    return said
