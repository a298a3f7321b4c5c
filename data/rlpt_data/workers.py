"""Jobs on several processes. A job that fails costs itself; a process that dies is replaced.

The results come in the order they finish, so nothing that is made of them may depend on it.
"""

import errno
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from rlpt_data.strict import UserError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
ATTEMPTS = 2
"""Of a job whose process died: the fault may have been the machine's."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Failure:
    """Why a job has no result."""

    error: str
    trace: str


def outcomes(
    task: Callable[[_Job], _Result], jobs: Sequence[_Job], num_workers: int
) -> Iterator[tuple[_Job, _Result | Failure]]:
    """Every job with its result, as they finish. Raises UserError for the user's mistakes."""
    if min(num_workers, len(jobs)) <= 1:
        for job in jobs:
            yield job, checked(attempted(task, job))
        return
    pool = _Pool(task, min(num_workers, len(jobs)))
    try:
        for job, result in pool.run(jobs):
            yield job, checked(result)
    finally:
        pool.end()


def attempted(task: Callable[[_Job], _Result], job: _Job) -> _Result | Failure | UserError:
    """The result of a job, or what became of it."""
    try:
        return task(job)
    except UserError as error:
        return error
    except Exception as error:
        if full := full_disk(error):
            return full
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())


def full_disk(error: BaseException | None) -> UserError | None:
    """What to say where there is no room left; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    return UserError(
        f"{error.filename or 'the output'}: {os.strerror(error.errno)}; make room and run the same "
        "command again"
    )


def checked(result: Any) -> Any:
    """The result, unless it is the user's mistake: that is raised."""
    if isinstance(result, UserError):
        raise result
    return result


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: int | None = None


class _Pool(Generic[_Job, _Result]):
    """Fresh processes, one pipe each; whoever is idle gets the next job."""

    def __init__(self, task: Callable[[_Job], _Result], size: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._task = task
        self._workers = [self._worker() for _ in range(size)]

    def run(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Any]]:
        waiting, left = deque(range(len(jobs))), len(jobs)
        attempts = [0] * len(jobs)
        while left:
            self._hand_out(waiting, jobs, attempts)
            busy = [worker for worker in self._workers if worker.job is not None]
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                number = worker.job
                assert number is not None
                result = self._answer(worker)
                if result is None and attempts[number] < ATTEMPTS:
                    waiting.append(number)
                    continue
                left -= 1
                died = Failure("its process was ended from outside, twice", "")
                yield jobs[number], died if result is None else result

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def _hand_out(self, waiting: deque[int], jobs: Sequence[_Job], attempts: list[int]) -> None:
        for worker in self._workers:
            if worker.job is None and waiting:
                worker.job = waiting.popleft()
                attempts[worker.job] += 1
                worker.pipe.send(jobs[worker.job])

    def _answer(self, worker: _Worker) -> Any:
        """What the worker says; None when it died, and then another takes its place."""
        try:
            return worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.pipe.close()
            self._workers[self._workers.index(worker)] = self._worker()
            return None
        finally:
            worker.job = None

    def _worker(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        words = (self._task, theirs, os.getpid())
        process = self._context.Process(target=_serve, args=words, daemon=False)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _serve(task: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(attempted(task, job))


def _leave_with(parent: int) -> None:
    """A parent that was killed tells nobody, and may have been while this process was still starting."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
