"""Checkpoints as a table for people to read."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Of `keeping.listed`: one line each."""
    shown = Table("name", "stage", "step of it", "bytes", "age", "state", box=None)
    for row in rows:
        place = ("stage", "stage_step")
        shown.add_row(
            row["name"],
            *("" if row[name] is None else str(row[name]) for name in place),
            f"{row['bytes']:,}",
            _age(row["age_seconds"]),
            row["state"] if row["reason"] is None else f"{row['state']}: {row['reason']}",
        )
    return shown


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
