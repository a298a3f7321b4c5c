"""Fits of the compute-performance law beside the published procedure, on the same simulated curves.

    python launch/bench/fit.py [--curves 1000] [--peer 10] [--json] [--write]

Curves are ScaleRL's (arXiv 2510.13786, table 1: .61/1.92/2542 from .30), 41 evaluations between 1.5k and 8k GPU-hours
with noise of .006. The published procedure (appendix A.5) takes a grid of A in .450, .455 .. .800 and C_mid in 100
linear steps from 100 to 40,000, and fits B in every cell with scipy's `curve_fit`; it has no intervals. Ours finds all
three, and 95% profile intervals of all three. Both run in turn in one process; seconds are of processor time.
"""

import argparse
import json
import statistics
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from step import cpu_name

from rlpt.law.least_squares import fit
from rlpt.law.points import Points
from rlpt.law.profile import intervals
from rlpt.law.sigmoid import Sigmoid

RESULTS = Path(__file__).with_name("fit.json")
START, CEILING, EXPONENT, MIDPOINT, NOISE = 0.30, 0.61, 1.92, 2542.0, 0.006


def sigmoid(compute: np.ndarray, ceiling: float, exponent: float, midpoint: float) -> np.ndarray:
    return START + (ceiling - START) / (1 + (midpoint / compute) ** exponent)


def curve(seed: int) -> Points:
    """One simulated run."""
    compute = np.linspace(1500, 8000, 41)
    noise = np.random.default_rng(seed).normal(0, NOISE, len(compute))
    return Points(compute, sigmoid(compute, CEILING, EXPONENT, MIDPOINT) + noise)


def ours(points: Points) -> float:
    """A; its interval and those of B and C_mid are computed, too."""
    fitted = fit(Sigmoid(START), points)
    intervals(fitted)
    return fitted.values["A"]


def published(points: Points) -> float:
    """A of the cell with the least squares."""
    best, least = 0.0, np.inf
    for ceiling in np.arange(0.450, 0.8001, 0.005):
        for midpoint in np.linspace(100, 40000, 100):
            error = _cell(points, ceiling, midpoint)
            if error < least:
                best, least = float(ceiling), error
    return best


def _cell(points: Points, ceiling: float, midpoint: float) -> float:
    def bent(compute: np.ndarray, exponent: float) -> np.ndarray:
        return sigmoid(compute, ceiling, exponent, midpoint)

    try:
        (exponent,), _ = curve_fit(bent, points.compute_N, points.value_N)
    except RuntimeError:
        # No B fits this cell.
        return np.inf
    return float(((points.value_N - bent(points.compute_N, exponent)) ** 2).sum())


def timed(procedure: Any, points: Points) -> tuple[float, float]:
    """(processor seconds, A)."""
    started = time.process_time()
    ceiling = procedure(points)
    return time.process_time() - started, ceiling


def measured(curves: int, peer: int) -> dict[str, Any]:
    """All curves by our procedure; every so many the published one does the same curve."""
    timed(ours, curve(curves))
    mine, its, pairs = [], [], []
    for seed in range(curves):
        mine.append(timed(ours, curve(seed)))
        if seed % (curves // peer) == 0:
            its.append(timed(published, curve(seed)))
            pairs.append(its[-1][0] / mine[-1][0])
    return {
        "curves": curves,
        "seconds_per_1000": 1000 * sum(seconds for seconds, _ in mine) / curves,
        "milliseconds": 1000 * statistics.median(seconds for seconds, _ in mine),
        "peer_curves": len(its),
        "peer_milliseconds": 1000 * statistics.median(seconds for seconds, _ in its),
        "ratio": statistics.median(pairs),
        "ratio_range": [min(pairs), max(pairs)],
        "ceiling": _moments([ceiling for _, ceiling in mine]),
        "peer_ceiling": _moments([ceiling for _, ceiling in its]),
    }


def _moments(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--curves", type=int, default=1000)
    parser.add_argument("--peer", type=int, default=10, help="curves the published procedure does")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", category=OptimizeWarning)
    # Cells far off overflow on the way.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    row = measured(chosen.curves, min(chosen.peer, chosen.curves))
    facts = {"date": date.today().isoformat(), "hardware": cpu_name(), "threads": 1}
    print(
        f"{row['seconds_per_1000']:.1f} s for 1,000 fits with intervals ({row['milliseconds']:.1f} ms each); "
        f"the published procedure {row['peer_milliseconds']:.0f} ms a fit, {row['ratio']:.0f} times as long"
    )
    if chosen.write:
        RESULTS.write_text(json.dumps(facts | row, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(facts | row))


if __name__ == "__main__":
    main()
