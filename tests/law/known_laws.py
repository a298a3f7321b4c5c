"""Curves whose law is known, and run folders that hold them: the fixture `known`."""

import json
from pathlib import Path

import numpy as np

from rlpt.law.points import Points

# ScaleRL, arXiv 2510.13786, table 1: run -> (C_mid in GPU-hours, B, A).
PUBLISHED = {
    "scalerl": (2542, 1.92, 0.610),
    "32k": (11272, 1.89, 0.645),
    "8gen": (2542, 2.44, 0.585),
    "24gen": (3054, 2.22, 0.590),
    "32gen": (2936, 2.07, 0.595),
    "scout": (4242, 1.65, 0.710),
    "bs512": (2818, 1.77, 0.605),
    "bs2048": (10909, 1.70, 0.645),
    "math": (2896, 2.05, 0.595),
    "code": (1675, 1.09, 0.615),
}
R0, NOISE = 0.30, 0.006


def sigmoid(compute, midpoint, exponent, ceiling, start=R0):
    """As the paper writes it."""
    return start + (ceiling - start) / (1 + (midpoint / compute) ** exponent)


def measured(low, high, count, truth=PUBLISHED["scalerl"], seed=0, noise=NOISE):
    """Points of a published curve, evenly over the compute, with the noise of evaluations."""
    compute = np.linspace(low, high, count)
    value = sigmoid(compute, *truth) + np.random.default_rng(seed).normal(0, noise, count)
    return Points(compute, value)


def write_run(folder: Path, evaluations, metrics=(), stages=(("think", "rl"),)) -> Path:
    """evaluations: (step, stage, summary); metrics: rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "stage": stage, "summary": table} for step, stage, table in evaluations]
    for name, lines in (("evaluations.jsonl", rows), ("metrics.jsonl", metrics)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"stage": [{"name": name, "kind": kind} for name, kind in stages]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
