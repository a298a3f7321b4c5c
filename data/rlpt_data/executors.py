"""Who runs the jobs of a pass: processes of our own, or datatrove's executors.

The outcomes are the same, and so are the bytes. A task of an executor that ends before its jobs do is
begun anew; a job that was begun ``ATTEMPTS`` times and never ended is a failure.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlpt_data.spool import Spool
from rlpt_data.strict import Strict, UserError
from rlpt_data.workers import ATTEMPTS, Failure, checked
from rlpt_data.workers import outcomes as workers_outcomes


class OwnWorkers(Strict):
    """Processes on this machine, as many as ``workers`` says."""

    kind: Literal["workers"] = "workers"


class _Tasks(Strict):
    tasks: int = Field(ge=1)
    """A pass is shared among so many."""
    at_once: int | None = Field(default=None, ge=1)
    """So many of them at a time; None: all."""
    poll_seconds: float = Field(default=1.0, gt=0.0)
    """How often to look for outcomes."""
    settle_seconds: float = Field(default=10.0, ge=0.0)
    """A shared file system may take so long to show what an ended task wrote."""


class LocalTasks(_Tasks):
    """datatrove's LocalPipelineExecutor, a process for each task."""

    kind: Literal["local"]


class SlurmTasks(_Tasks):
    """datatrove's SlurmPipelineExecutor, an array job for each pass."""

    kind: Literal["slurm"]
    partition: str
    time: str
    """Limit of a task, as Slurm writes it; what was not begun by then goes to the next round."""
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    qos: str | None = None
    env_command: str | None = None
    """Shell line that makes the environment of a task; None: that of this interpreter."""
    sbatch_args: dict[str, str] = Field(default_factory=dict)
    """Other options, as {account = "x"}."""
    max_array_size: int = Field(default=1001, ge=1)
    """The cluster's MaxArraySize; beyond it the tasks are several arrays, one after the other."""


class RayTasks(_Tasks):
    """datatrove's RayPipelineExecutor."""

    kind: Literal["ray"]
    address: str | None = None
    """Of the cluster; None: as RAY_ADDRESS says, else one that is started on this machine."""
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: float = Field(default=2.0, gt=0.0)


ExecutorConfig = Annotated[
    OwnWorkers | LocalTasks | SlurmTasks | RayTasks, Field(discriminator="kind")
]
OWN_WORKERS = OwnWorkers()


def check_executor(executor: ExecutorConfig, num_workers: int) -> None:
    """Raises UserError for a number of workers that nobody would read."""
    if not isinstance(executor, OwnWorkers) and num_workers != 1:
        raise UserError(
            f"workers = {num_workers}: these are for [executor] kind = workers, this one is "
            f"{executor.kind}; set executor.tasks and executor.at_once"
        )


def outcomes(
    task: Callable[[Any], Any],
    jobs: Sequence[Any],
    executor: ExecutorConfig,
    num_workers: int,
    folder: Path,
) -> Iterator[tuple[Any, Any]]:
    """Every job with its result or Failure, as they finish. Raises UserError for the user's mistakes.

    ``folder`` is on a file system that every task sees. What tasks went on to finish when the one
    who waited for them was killed is found there by the next who asks for the same jobs.
    """
    if isinstance(executor, OwnWorkers):
        yield from workers_outcomes(task, jobs, num_workers)
        return
    folder.mkdir(parents=True, exist_ok=True)
    spool, left = Spool(folder), {job.unit: job for job in jobs}
    _try_again(spool, left)
    yield from _arrived(spool, left)
    while left:
        yield from _round(task, spool, left, executor)


def _try_again(spool: Spool, units: Iterable[str]) -> None:
    """What failed in an earlier run, or was begun and not finished, has all its attempts again."""
    for unit in units:
        outcome = spool.outcome(unit)
        if outcome is None or isinstance(outcome, Failure | UserError):
            spool.forget(unit)


def _round(
    task: Callable[[Any], Any],
    spool: Spool,
    left: dict[str, Any],
    executor: LocalTasks | SlurmTasks | RayTasks,
) -> Iterator[tuple[Any, Any]]:
    """One launch of the executor with all jobs that are left; what it finished leaves ``left``."""
    from rlpt_data.launching import (
        launched,
    )  # datatrove: only where one of its executors is asked for

    before = _progress(spool, left)
    spool.write(task, list(left.values()))
    run = launched(executor, spool.folder, min(executor.tasks, len(left)))
    try:
        alive, deadline = True, 0.0
        while left and (alive or time.monotonic() < deadline):
            if alive and not (alive := run.alive()):
                deadline = time.monotonic() + executor.settle_seconds
            # Asked first: what has ended wrote everything before.
            yield from _arrived(spool, left)
            if left:
                time.sleep(executor.poll_seconds)
    finally:
        run.cancel()
    if left and _progress(spool, left) == before:
        raise UserError(
            f"{spool.folder}: the tasks of the {executor.kind} executor ended before they began a "
            "job; their logs are in that folder"
        )
    for unit in [unit for unit in left if spool.begun(unit) >= ATTEMPTS]:
        yield left.pop(unit), Failure(f"its task ended without a result, {ATTEMPTS} times", "")


def _progress(spool: Spool, left: dict[str, Any]) -> tuple[int, int]:
    return len(left), sum(map(spool.begun, left))


def _arrived(spool: Spool, left: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Outcomes that are there; forgotten once whoever asked for them has written them down."""
    for unit in spool.arrived(left):
        outcome = spool.outcome(unit)
        if outcome is not None:
            yield left.pop(unit), checked(outcome)
            spool.forget(unit)
