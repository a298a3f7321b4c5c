"""Hours of training on one machine: memory, open files and threads of the trainer, sampled while it runs.

    python launch/faults/soak.py --hours 2 [--out FOLDER] [--write]

The quickstart's run (its policy, text and batch), with checkpoints, evaluations and rollouts more often than there, so
that whatever a save or an evaluation leaves behind adds up. It ends by SIGTERM, as a preempted run does. `--write`
keeps what was seen in soak.json.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from jaxtyping import Float
from machine import machine
from scipy import stats

from rlpt.console import progress

RESULTS = Path(__file__).with_name("soak.json")
CONFIG = Path("configs/train/quickstart.toml")
ENDLESS = (
    "stage.1.steps=1000000",
    "checkpoint.every=20",
    "evaluation.every=200",
    "log.rollouts_every=5",
    # What becomes of so small a policy in hours is not the question: guards watch, and end nothing.
    "guards.truncation_halt=1.0",
    "guards.grad_norm_halt=inf",
)
SECONDS_BETWEEN = 10.0
WARM_UP = 0.15
"""Share of the time that is left out: caches fill, the allocator finds its size."""
BLOCK_SECONDS = 300.0
"""Means of so long are taken as independent: an evaluation and ten saves are in each."""


class Sample(NamedTuple):
    seconds: float
    step: int
    rss_mib: float
    private_mib: float
    files: int
    threads: int


def command(run_dir: Path) -> list[str]:
    words = [f"--set={word}" for word in (f"run_dir={run_dir}", *ENDLESS)]
    return [sys.executable, "-m", "rlpt.train", str(CONFIG), *words]


def samples(process: psutil.Process, run_dir: Path, seconds: float) -> Iterator[Sample]:
    """One every ten seconds, until the time is over or the process is."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds and process.is_running():
        memory = process.memory_full_info()
        yield Sample(
            passed,
            steps(run_dir),
            memory.rss / 2**20,
            memory.uss / 2**20,
            process.num_fds(),
            process.num_threads(),
        )
        time.sleep(SECONDS_BETWEEN)


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def slope(hours: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"]) -> dict[str, float]:
    """Least squares over means of blocks, which are taken as independent: per hour, with its 95% interval."""
    block = np.floor(hours * 3600 / BLOCK_SECONDS)
    x, y = (np.array([v[block == b].mean() for b in np.unique(block)]) for v in (hours, values))
    fitted, covariance = np.polyfit(x, y, 1, cov=True)
    half = stats.t.ppf(0.975, len(x) - 2) * covariance[0, 0] ** 0.5
    rise = float(fitted[0])
    return {"per_hour": rise, "low": rise - half, "high": rise + half, "mean": float(y.mean())}


def summary(taken: list[Sample]) -> dict[str, object]:
    """Slopes after the warm-up; first and last values of what must not grow at all."""
    last = taken[-1]
    steady = [each for each in taken if each.seconds >= WARM_UP * last.seconds]
    hours = np.array([each.seconds / 3600 for each in steady])
    grown = {
        name: slope(hours, np.array([getattr(each, name) for each in steady], dtype=float))
        for name in ("rss_mib", "private_mib", "files", "threads")
    }
    ends = {
        name: [min(getattr(each, name) for each in part), max(getattr(each, name) for each in part)]
        for name, part in ((n, steady) for n in ("rss_mib", "private_mib", "files", "threads"))
    }
    return {
        "hours": last.seconds / 3600,
        "steps": last.step,
        "samples": len(taken),
        "slopes": grown,
        "least_and_most": ends,
    }


def run(out: Path, hours: float) -> tuple[list[Sample], int]:
    """Samples of a run of so many hours, and its exit code after SIGTERM."""
    out.mkdir(parents=True)
    with (out / "log").open("wb") as log:
        child = subprocess.Popen(
            command(out / "run"), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        taken = []
        with progress("soak", int(hours * 3600), 0, show=True) as report:
            for each in samples(psutil.Process(child.pid), out / "run", hours * 3600):
                taken.append(each)
                said = f"step {each.step}  {each.rss_mib:.0f} MiB  {each.files} files  {each.threads} threads"
                report(int(each.seconds), said)
                (out / "samples.json").write_text(json.dumps(taken))
        child.send_signal(signal.SIGTERM)
        return taken, child.wait(timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hours of training, and what grows.")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--write", action="store_true")
    words = parser.parse_args()
    taken, code = run(words.out, words.hours)
    found = machine() | {"exit_code_after_sigterm": code} | summary(taken)
    print(json.dumps(found, indent=1))
    if words.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
