"""Steps of every arm in turn, and what they mean side by side.

Machines are noisy and drift, so nothing is compared across rounds: every arm steps once a round, the order rotates, and
a ratio is the median of the ratios within rounds.
"""

import time
from pathlib import Path
from statistics import median
from typing import Protocol

import psutil
import torch
from arms import Step
from problem import Problem

from rlpt.console import Report, progress

PHASES = ("step", "generate", "score", "train", "score_train", "step_cpu", "score_train_cpu")
STATUS = Path("/proc/self/status")


class Arm(Protocol):
    name: str

    def step(self) -> Step: ...


Steps = dict[str, list[Step]]
"""Of every arm, one a round."""


def timed(arms: list[Arm], num_rounds: int) -> tuple[Steps, Steps, float]:
    """(the first step of every arm, which warms up, all later ones, the share of the threads' time that was ours)."""
    with progress("steps", len(arms) * (1 + num_rounds), 0, show=True) as report:
        first, _ = _rounds(arms, 1, 0, report)
        steps, cpu_share = _rounds(arms, num_rounds, len(arms), report)
    return first, steps, cpu_share


def _rounds(arms: list[Arm], num_rounds: int, done: int, report: Report) -> tuple[Steps, float]:
    steps: Steps = {arm.name: [] for arm in arms}
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(num_rounds):
        begin = number % len(arms)
        for arm in arms[begin:] + arms[:begin]:
            steps[arm.name].append(arm.step())
            done += 1
            report(done, f"{arm.name} {steps[arm.name][-1].step:.2f} s")
    available = (time.perf_counter() - wall) * torch.get_num_threads()
    return steps, (time.process_time() - cpu) / available


def ratio(steps: list[Step], peer: list[Step] | None, phase: str) -> float | None:
    """The median over rounds of time / the peer's time; None without a peer."""
    if peer is None:
        return None
    pairs = zip(steps, peer, strict=True)
    return median(getattr(mine, phase) / getattr(other, phase) for mine, other in pairs)


def rows(given: Problem, first: Steps, steps: Steps, gflop: dict[str, float]) -> list[dict]:
    """Everything known of an arm, flat. ``*_over_shared`` is how many times as long as the shared arm it takes.

    ``gflop``: of scoring and training, where it is known.
    """
    found = []
    for name, mine in steps.items():
        row = {"arm": name, **given.size._asdict(), "sequences": given.size.sequences}
        row |= {"token_ratio": given.size.token_ratio}
        row |= {f"{phase}_s": median(getattr(step, phase) for step in mine) for phase in PHASES}
        row |= {f"{phase}_min_s": min(getattr(step, phase) for step in mine) for phase in PHASES}
        for phase in ("step", "generate", "score_train", "step_cpu", "score_train_cpu"):
            row[f"{phase}_over_shared"] = ratio(mine, steps.get("shared"), phase)
        if name in gflop:
            row["score_train_gflop"] = gflop[name]
            row["score_train_gflop_per_s"] = gflop[name] / row["score_train_s"]
        # Of the first step, from the weights that all arms start with.
        row |= {"reward": first[name][0].reward, "loss": first[name][0].loss}
        found.append(row | {"rounds": len(mine)})
    return found


def peak_bytes(arm: Arm, device: torch.device) -> int | None:
    """The most that one step held beyond what was there before it; None where the system does not tell.

    Meant for a process of its own: what an earlier arm has freed and the allocator kept would hide a peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step()
        return torch.cuda.max_memory_allocated() - before
    if not STATUS.exists():
        return None
    # Forgets the peak of everything that was set up.
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    arm.step()
    (peak,) = [line.split()[1] for line in STATUS.read_text().splitlines() if "VmHWM" in line]
    return int(peak) * 1024 - before
