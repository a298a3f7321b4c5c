"""Runs -> HTML. Everything from a run goes through the template's escaping; only our own drawings are
markup, and only the page's own script may run: its hash stands in the content security policy.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

import rlpt
from rlpt.report import (
    charts,
    clock,
    compared,
    curves,
    guarded,
    judged,
    results,
    rollouts,
    signs,
    words,
)
from rlpt.report.drawing import finite, sparkline
from rlpt.report.evidence import data_cards, evidence
from rlpt.report.run import Row, Run
from rlpt.report.settings import Setting, beside_defaults, between
from rlpt.report.words import duration, interval, number, signed
from rlpt_data.visible import visible

_STYLES = ("page.css", "browser.css")
_SCRIPTS = ("rollouts.js", "drawing.js", "browse.js", "page.js")


def render(runs: Sequence[Run]) -> str:
    """The whole page: of one run its results, of several a comparison."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_file),
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "interval": interval,
        "visible": lambda value: visible(str(value)),
    }
    parts = _shared(runs) | (_of_one(runs[0]) if len(runs) == 1 else _of_several(runs))
    template = environment.get_template("page.html.j2")
    return template.render(**parts, sections=_sections(parts), **_frame())


def _file(name: str) -> str:
    return (resources.files("rlpt.report") / name).read_text(encoding="utf-8")


def _frame() -> Row:
    """Style and script, and the hash without which no browser runs the script."""
    script = "\n".join(_file(name) for name in _SCRIPTS)
    digest = hashlib.sha256(script.encode()).digest()
    return {
        "style": Markup("\n".join(_file(name) for name in _STYLES)),
        "script": Markup(script),
        "script_hash": base64.b64encode(digest).decode(),
        "version": rlpt.__version__,
    }


_SECTIONS = {
    "results": "results",
    "controls": "controls",
    "rollouts": "thoughts",
    "curves": "training",
    "clocks": "time",
    "mismatch": "engine",
    "watches": "alarms",
    "signs": "signs",
    "data": "data",
    "settings": "settings",
    "evidence": "evidence",
}
_ANCHORS = {"curves": "training", "clocks": "time", "mismatch": "engine", "watches": "alarms"}


def _sections(parts: Row) -> list[tuple[str, str]]:
    """(anchor, name) of what the page has."""
    always = ("results", "data", "settings", "evidence")
    return [
        (_ANCHORS.get(part, part), text)
        for part, text in _SECTIONS.items()
        if part in always or parts.get(part)
    ]


def _shared(runs: Sequence[Run]) -> Row:
    """What one run and several show alike."""
    embedded = rollouts.embedded(runs)
    return {
        "several": len(runs) > 1,
        "names": [run.name for run in runs],
        "held_out": _drawn(charts.held_out(runs)),
        "curves": _all_drawn(curves.curves(runs)),
        "clocks": [_clock(run, len(runs) > 1) for run in runs if clock.time_totals(run)],
        "parts": clock.PARTS,
        "mismatch": _all_drawn(judged.mismatch(runs)),
        "limits": judged.shared_limits(runs) is not None,
        "alarms": [(run.name, *found) for run in runs if (found := judged.alarms(run))],
        "watches": guarded.watches(runs),
        "watch_charts": _all_drawn(guarded.charts(runs)),
        "skipped": [(run.name, found) for run in runs if (found := guarded.skipped(run))],
        "signs": signs.signs(runs),
        "sign_charts": _all_drawn(signs.charts(runs)),
        "rollouts": embedded.text,
        "scale": embedded.scale,
        "data": [(run.name, data_cards(run)) for run in runs],
        "settings": _settings(runs),
        "setting_titles": [run.name for run in runs] if len(runs) > 1 else ["default", "this run"],
        "evidence": [(run.name, evidence(run)) for run in runs],
        "metrics": [(run.name, rows) for run in runs if (rows := _all_metrics(run))],
        "configs": [(run.name, json.dumps(run.config, indent=2)) for run in runs],
        "missing": _missing(runs),
    }


def _of_one(run: Run) -> Row:
    label, sentence = words.verdict(run)
    last = run.last_evaluation
    return {
        "title": f"{run.name}: {label}",
        "name": run.name,
        "label": label,
        # The hyphen that does not break: the headline is short.
        "sentence": sentence.replace("held-out", "held\N{NON-BREAKING HYPHEN}out"),
        "figures": words.figures(run),
        "expectation": words.expectation(run),
        "reasons": run.summary.get("verdict_reasons") or last.get("verdict_reasons") or [],
        "tiles": results.tiles(run),
        "ends": results.ends(run),
        "forest": _drawn(charts.forest(last)),
        "controls": results.control_rows(last),
        "checks": results.checks(last),
        "stages": results.stages(run),
        "thought": last.get("thought") or {},
        "lengths": _drawn(charts.lengths((last.get("thought") or {}).get("len_histogram") or [])),
        "domains": results.domains(last),
        "evaluation": last.get("evaluation") or {},
    }


def _of_several(runs: Sequence[Run]) -> Row:
    columns, table = compared.measured(compared.table(runs))
    return {
        "title": "rlpt: " + ", ".join(run.name for run in runs),
        "stages": [],
        "columns": columns,
        "table": table,
        "side_by_side": _drawn(charts.side_by_side(runs)),
        "control_titles": [words.CONTROLS[name][0] for name in compared.RIVALS],
        "controls": compared.controls(runs),
    }


def _drawn(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)


def _all_drawn(drawings: Sequence[str]) -> list[Markup]:
    return [Markup(svg) for svg in drawings]


def _clock(run: Run, small: bool) -> Row:
    """Seconds and share of every part of a run's steps."""
    totals = clock.time_totals(run)
    whole = sum(totals.values()) or 1.0
    return {
        "name": run.name,
        "drawing": _drawn(clock.step_time(run, small)),
        "rows": [(duration(part), f"{100 * part / whole:.0f}%") for part in totals.values()],
        "total": duration(sum(totals.values())),
    }


def _settings(runs: Sequence[Run]) -> list[Setting] | None:
    return between(runs) if len(runs) > 1 else beside_defaults(runs[0])


def _all_metrics(run: Run) -> list[Row]:
    names = sorted({name for row in run.metrics for name in row} - {"step", "stage"})
    rows = []
    for name in names:
        if points := finite(run.metrics, name):
            values = [value for _, value in points]
            line = Markup(sparkline(values))
            first, last = values[0], values[-1]
            rows.append(
                {"name": name, "first": first, "last": last, "steps": len(values), "line": line}
            )
    return rows


def _missing(runs: Sequence[Run]) -> list[str]:
    """What the page cannot show; with several runs each line begins with its run."""
    lines = [(run, line) for run in runs for line in results.missing(run)]
    return [f"{run.name}: {line}" if len(runs) > 1 else line for run, line in lines]
