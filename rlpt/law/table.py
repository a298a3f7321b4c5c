"""What `rlpt fit` found, for people to read: a table of parameters, and what to make of it in words."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_FORMULAS = {
    "sigmoid": "R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)",
    "power": "P(C) = A / C^alpha + P*",
}
_MEANINGS = {
    "A": "ceiling A",
    "B": "efficiency B",
    "C_mid": "half-way C_mid",
    "P*": "ceiling P*",
    "alpha": "exponent alpha",
}


def render(found: dict[str, Any]) -> Group:
    """One row a run, then one line a finding."""
    title = f"{found['y']} against {found['x']}: {_FORMULAS[found['law']]}"
    parts = [_table(title, found["runs"])]
    if "shared_ceiling" in found:
        parts += [Text(), _table("under one ceiling", found["shared_ceiling"]["runs"])]
    return Group(*parts, Text("\n".join(["", *lines(found)])))


def _table(title: str, runs: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("run")
    names = list(runs[0]["parameters"])
    alone = "points" in runs[0]
    for heading in (
        *(["points", "start"] if alone else []),
        *(_MEANINGS[name] for name in names),
        "noise",
    ):
        table.add_column(heading, justify="right")
    for run in runs:
        counted = [str(len(run["points"]["fitted"])), _start(run)] if alone else []
        # Text: in a plain string rich takes brackets for markup.
        cells = [Text(_parameter(run["parameters"][name])) for name in names]
        table.add_row(Text(run["name"]), *counted, *cells, number(run["noise"]))
    return table


def _start(run: dict[str, Any]) -> str:
    return "-" if run["start"] is None else number(run["start"]["value"])


def lines(found: dict[str, Any]) -> list[str]:
    """In words: what was dropped, what cannot be said, and how well the law predicts."""
    runs, unit = found["runs"], found["x"]
    said = [line for run in runs for line in _of_run(run, unit, len(runs) > 1)]
    if "shared_ceiling" in found:
        said.append(_of_ceiling(found["shared_ceiling"]))
    return said


def _of_run(run: dict[str, Any], unit: str, named: bool) -> list[str]:
    points, said = run["points"], []
    dropped = f"{len(points['early'])} dropped before {number(points['skip_before'])} {unit}"
    start = "" if run["start"] is None else f"; R0 is {run['start']['from']}"
    said.append(f"{len(points['fitted'])} points fitted, {dropped}{start}")
    if points["not_finite"]:
        said.append(f"{points['not_finite']} points are no numbers (NaN) and were dropped")
    if run["note"]:
        said.append(run["note"])
    ceiling, value = next(iter(run["parameters"].items()))
    if "reason" in value:
        said.append(f"{ceiling} {value['reason']}")
    said.append(_prediction(run["hold_out"], unit))
    return [f"{run['name']}: {line}" if named else line for line in said]


def _prediction(miss: dict[str, Any] | None, unit: str) -> str:
    if miss is None:
        return "hold-out: none (it needs 4 points to fit before what is held out)"
    way = "too high" if miss["signed"] < 0 else "too low"
    return (
        f"hold-out: fitted up to {number(miss['until'])} {unit} ({miss['fitted_points']} points), it misses the next "
        f"{miss['predicted_points']} by {number(miss['rms'])} (rms; noise {number(miss['noise'])}), "
        f"{number(abs(miss['signed']))} {way} on average"
    )


def _of_ceiling(shared: dict[str, Any]) -> str:
    p = shared["p_value"]
    verdict = (
        "the runs agree with one ceiling" if p >= 0.05 else "one ceiling does not fit all runs"
    )
    reason = shared["ceiling"].get("reason")
    return (
        f"one ceiling: {_parameter(shared['ceiling'])}; alone they differ by {number(shared['largest_difference'])}; "
        f"{verdict} (p = {p:.2g})" + (f"; it {reason}" if reason else "")
    )


def _parameter(value: dict[str, Any]) -> str:
    low, high = (
        number(value[end]) if value[end] is not None else "no end" for end in ("ci_low", "ci_high")
    )
    return f"{number(value['value'])} [{low}, {high}]"


def number(value: float) -> str:
    """Four figures; whole numbers with commas where there are more before the point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
