"""`rlpt fit`: curves in; fit.json, fit.svg and fit.png out.

Every curve is fitted alone, asked to predict its own second half, and, where that is wanted, fitted again under one
ceiling with the others.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlpt.law.ceiling import shared
from rlpt.law.curves import read
from rlpt.law.findings import Found, Table, tabled
from rlpt.law.holdout import LEAST_POINTS, held_out
from rlpt.law.least_squares import fit
from rlpt.law.plot import draw
from rlpt.law.points import Law, Points
from rlpt.law.power import Power
from rlpt.law.profile import intervals
from rlpt.law.sigmoid import Sigmoid
from rlpt.law.window import window
from rlpt_data.strict import UserError

HELD_OUT = 0.5
"""Of the compute, unless said otherwise."""


@dataclass(frozen=True)
class Request:
    """What is asked of every curve."""

    x: str = "steps"
    y: str = "gain_heldout.mean"
    law: Literal["sigmoid", "power"] = "sigmoid"
    skip_before: float | None = None
    """None: `window.EARLY` of the compute."""
    hold_out: float | None = None
    """None: HELD_OUT where there are points enough, and why not where there are not. 0: nothing is held out."""
    start_value: float | None = None
    """None: the first point."""
    from_step: int | None = None
    """None: where a run's first stage of thinking begins."""
    weighted: bool = False
    """Noise from the intervals of the values, not from the residuals."""
    shared_ceiling: bool = False


def run(sources: Sequence[Path], request: Request, out: Path | None = None) -> Table:
    """Fit every source, write the files and return what fit.json holds. Raises UserError for what cannot be fitted."""
    _check(sources, request)
    found = [_found(source, request) for source in sources]
    if len({each.curve.name for each in found}) < len(found):
        found = [_renamed(each, source) for each, source in zip(found, sources, strict=True)]
    together = shared([each.fitted for each in found]) if request.shared_ceiling else None
    folder = out or _beside(sources)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fit.json", "fit.png", "fit.svg"):
        # The run may be somebody else's, and this a link to a file of ours.
        (folder / name).unlink(missing_ok=True)
    table = {"law": request.law, "x": request.x, "y": request.y} | tabled(found, together)
    (folder / "fit.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
    draw(found, together, request.x, request.y, folder)
    return table | {"out": str(folder / "fit.json"), "figure": str(folder / "fit.png")}


def _check(sources: Sequence[Path], request: Request) -> None:
    paths = [source.resolve() for source in sources]
    if twice := [
        source for source, path in zip(sources, paths, strict=True) if paths.count(path) > 1
    ]:
        raise UserError(f"{twice[0]}: given twice; name every source once")
    if request.shared_ceiling and len(sources) < 2:
        raise UserError(
            "--shared-ceiling: one run alone has nothing to share; name several, or leave it out"
        )
    if request.law == "power" and request.start_value is not None:
        raise UserError(
            "--start-value: the power law has no start; use --law sigmoid, or leave it out"
        )


def _found(source: Path, request: Request) -> Found:
    curve = read(source, request.x, request.y, request.from_step)
    start = None if request.law == "power" else request.start_value
    if request.law == "sigmoid" and start is None:
        start = "measured"
    seen = window(curve, request.skip_before, start, request.weighted)

    def law(points: Points) -> Law:
        if seen.start is None:
            return Power(float(points.compute_N.max()))
        return Sigmoid(seen.start)

    fitted = fit(law(seen.points), seen.points)
    fraction = HELD_OUT if request.hold_out is None else request.hold_out
    miss = held_out(law, seen.points, fraction) if fraction else None
    if miss is None and request.hold_out:
        raise UserError(
            f"{curve.name}: --hold-out {fraction:g} leaves fewer than {LEAST_POINTS} points to fit; "
            "evaluate more often, or hold out less"
        )
    return Found(curve, seen, fitted, intervals(fitted), miss)


def _renamed(each: Found, source: Path) -> Found:
    """Of two runs called `gain` the paths tell which is which."""
    return replace(each, curve=replace(each.curve, name=str(source)))


def _beside(sources: Sequence[Path]) -> Path:
    """The run's own folder, or the one that holds all the sources."""
    folders = [source if source.is_dir() else source.parent for source in sources]
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))
