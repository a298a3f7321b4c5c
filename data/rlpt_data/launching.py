"""datatrove's executors, launched and watched. Each runs ``spool.work_off`` as its only step."""

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from rlpt_data.executors import LocalTasks, RayTasks, SlurmTasks
from rlpt_data.manifest import digest
from rlpt_data.spool import work_off
from rlpt_data.strict import UserError


@runtime_checkable
class Round(Protocol):
    """Tasks that were launched."""

    def alive(self) -> bool:
        """Whether any of them may still write an outcome."""
        ...

    def cancel(self) -> None:
        """End those that have not ended."""
        ...


def launched(executor: LocalTasks | SlurmTasks | RayTasks, folder: Path, tasks: int) -> Round:
    """The jobs in the spool ``folder``, shared among ``tasks``. Raises UserError without the means."""
    if isinstance(executor, SlurmTasks):
        return SlurmArrays(executor, folder.resolve(), tasks)
    where = str(folder.resolve())
    if isinstance(executor, RayTasks):
        if importlib.util.find_spec("ray") is None:
            raise UserError("[executor] kind = ray: the package ray is missing; pip install ray")
        return Processes(_run_ray, [(where, executor, tasks)], 1)
    ranks = [(where, tasks, rank) for rank in range(tasks)]
    return Processes(_run_local, ranks, executor.at_once or tasks)


class Processes:
    """One process for each part of the work, so that one that is killed takes no other with it.

    datatrove's own pool waits forever for a process that was killed.
    """

    def __init__(
        self, target: Callable[..., None], parts: Sequence[tuple[Any, ...]], at_once: int
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._target = target
        self._waiting = deque(parts)
        self._at_once = at_once
        self._running: list[Any] = []

    def alive(self) -> bool:
        for process in [process for process in self._running if not process.is_alive()]:
            self._end(process)
        while self._waiting and len(self._running) < self._at_once:
            arguments = (os.getpid(), self._target, self._waiting.popleft())
            process = self._context.Process(target=_in_own_group, args=arguments)
            process.start()
            self._running.append(process)
        return bool(self._running)

    def cancel(self) -> None:
        self._waiting.clear()
        for process in list(self._running):
            self._end(process)

    def _end(self, process: Any) -> None:
        """With everything it started."""
        process.kill()
        # No such group: it never got as far as having one, or it left nobody behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        self._running.remove(process)


def _in_own_group(parent: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    target(*arguments)


def _leave_with(parent: int) -> None:
    """A parent that was killed tells nobody."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _quiet(folder: str, name: str) -> None:
    """What datatrove says goes to its log."""
    logs = Path(folder, "logs")
    logs.mkdir(exist_ok=True)
    file = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _run_local(folder: str, tasks: int, rank: int) -> None:
    _quiet(folder, f"output_{rank:05d}.log")
    LocalPipelineExecutor(
        pipeline=[functools.partial(work_off, folder)],
        tasks=tasks,
        workers=1,
        local_tasks=1,
        local_rank_offset=rank,
        logging_dir=folder,
        skip_completed=False,
    ).run()


def _run_ray(folder: str, executor: RayTasks, tasks: int) -> None:
    import ray  # pyright: ignore[reportMissingImports]  # not among our dependencies

    _quiet(folder, "output.log")
    with ray.init(address=executor.address):
        RayPipelineExecutor(
            pipeline=[functools.partial(work_off, folder)],
            tasks=tasks,
            workers=executor.at_once or tasks,
            cpus_per_task=executor.cpus_per_task,
            mem_per_cpu_gb=executor.mem_per_cpu_gb,
            logging_dir=folder,
            skip_completed=False,
        ).run()


class SlurmArrays:
    """Array jobs under a name that only this folder has."""

    def __init__(self, executor: SlurmTasks, folder: Path, tasks: int) -> None:
        for command in ("sbatch", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise UserError(
                    f"[executor] kind = slurm: no command {command} here; run it where jobs are "
                    "submitted"
                )
        self._name = f"rlpt-{digest(str(folder).encode())[:12]}"
        self.cancel()  # those of a run that was killed while it waited
        self._submit(executor, folder, tasks)

    def alive(self) -> bool:
        listed = _slurm("squeue", "--noheader", "--format=%i", f"--name={self._name}")
        # A controller that does not answer says nothing about the tasks.
        return listed.returncode != 0 or bool(listed.stdout.strip())

    def cancel(self) -> None:
        _slurm("scancel", f"--name={self._name}")

    def _submit(self, executor: SlurmTasks, folder: Path, tasks: int) -> None:
        logger.disable("datatrove")
        python = Path(sys.executable).parent
        try:
            _Arrays(
                pipeline=[functools.partial(work_off, str(folder))],
                tasks=tasks,
                workers=executor.at_once or -1,
                time=executor.time,
                partition=executor.partition,
                cpus_per_task=executor.cpus_per_task,
                mem_per_cpu_gb=executor.mem_per_cpu_gb,
                qos=executor.qos or "",
                env_command=executor.env_command or f'export PATH="{python}:$PATH"',
                sbatch_args=executor.sbatch_args,
                max_array_size=executor.max_array_size,
                job_name=self._name,
                logging_dir=str(folder),
                skip_completed=False,
            ).run()
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"[executor] kind = slurm: sbatch ended with {error.returncode}, its reason is "
                f"above; the script is {folder}/launch_script.slurm"
            ) from error
        finally:
            logger.enable("datatrove")


class _Arrays(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Nothing: its job would wait forever for an array that failed, and the ledger counts."""


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
