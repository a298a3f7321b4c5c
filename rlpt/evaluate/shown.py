"""A ladder's table for people to read in a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(found: Mapping[str, Any]) -> "Group":
    """The table, and under it what a reader has to know of it."""
    from rich.console import Group
    from rich.text import Text

    notes = [f"change: gain minus that of {found['against']}, prompt by prompt"]
    if len(found["seeds"]) > 1:
        notes.append(f"pooled over the seeds {', '.join(map(str, found['seeds']))}")
    notes += [f"left out: {line}" for line in found["missing"]]
    notes += [f"{row['name']}: {line}" for row in found["rungs"] for line in row["warnings"]]
    unknown = {
        row["training"]["unknown"]: row["name"]
        for row in reversed(found["rungs"])
        if "unknown" in row["training"]
    }
    notes += [f"training of {name} unknown: {why}" for why, name in unknown.items()]
    notes += [f"{name}: {found[name]}" for name in ("ladder", "figure") if found.get(name)]
    return Group(table(found), *map(Text, notes))


def table(found: Mapping[str, Any]) -> "Table":
    """A row for every rung: what it cost, what it gained."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("rung", overflow="fold")
    for title in ("training\nFLOPs", "tokens a\nthought"):
        made.add_column(title, justify="right")
    for title in ("gain,\nnats a token", "change", "own - empty"):
        made.add_column(title, justify="right")
    made.add_column("bits a\nbyte", justify="right")
    made.add_column("verdict")
    for row in found["rungs"]:
        made.add_row(*map(Text, cells(row)))
    return made


def cells(row: Mapping[str, Any]) -> list[str]:
    """One rung in words."""
    thinking, change = row["thinking"], row.get("change")
    empty = row["controls"].get("empty")
    bits = row["bits_per_byte"]
    return [
        row["name"],
        counted(row["training"].get("flops")),
        f"{thinking['tokens_per_thought']:.1f}",
        interval(row["gain_heldout"]),
        "" if change is None else interval(change["gain"]),
        "" if empty is None else interval(empty["own_minus_control"]),
        "" if bits is None else f"{bits['mean']:.3f}",
        row["verdict"],
    ]


def interval(value: Mapping[str, Any]) -> str:
    """mean [low, high]; a mean alone where documents are too few for an interval."""
    if value["ci_low"] is None:
        return f"{value['mean']:+.3f}"
    return f"{value['mean']:+.3f} [{value['ci_low']:+.3f}, {value['ci_high']:+.3f}]"


def counted(value: float | None) -> str:
    """1234567 -> 1.23M; "?" where it is unknown."""
    if value is None:
        return "?"
    for size, letter in _UNITS:
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
