"""The folder of unfinished work beside the output: its lock, its plan, its ledger, its passes.

    .NAME.work/plan.json  ledger.jsonl  lock  read/  clean/  shards/  spool/  failed/

A pass runs those of its units that the ledger does not hold yet. A unit that fails is quarantined,
with its error in ``failed/``, and the others go on.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

from rlpt_data import plan as plans
from rlpt_data.executors import OWN_WORKERS, ExecutorConfig, outcomes
from rlpt_data.ledger import Entry, Ledger
from rlpt_data.manifest import digest, digest_file
from rlpt_data.plan import Plan
from rlpt_data.progress import STDERR, shown
from rlpt_data.strict import UserError
from rlpt_data.tally import Tally
from rlpt_data.visible import visible
from rlpt_data.workers import Failure, full_disk

_LONGEST_NAME = 200
"""Bytes; file systems take 255."""


@runtime_checkable
class Job(Protocol):
    """What a worker gets: it is pickled, so it holds names and numbers, not open files."""

    @property
    def unit(self) -> str: ...


@dataclass(frozen=True)
class Done:
    """What a worker gives back."""

    files: tuple[Path, ...] = ()
    tally: Tally = field(default_factory=Tally)
    facts: dict[str, Any] = field(default_factory=dict)
    documents: int = 0


class Alone:
    """The hidden folder beside ``out``, opened by ``with``; who opens it meanwhile is refused.

    It goes when it holds nothing but the lock. A full disk is one line. Raises UserError.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f".{out.name}.work"

    def __enter__(self) -> "Alone":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self._refuse()
            say(
                f"{self.path}: this filesystem has no locks ({error.strerror}): take care to start no second run"
            )
        if not self._is_ours():
            self._refuse()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._is_ours() and os.listdir(self.path) == ["lock"]:
            shutil.rmtree(self.path)
        self._lock.close()
        if full := full_disk(error):
            raise full from error

    def _is_ours(self) -> bool:
        """Whoever has just ended may have taken away the file that was opened."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / "lock"))
        except FileNotFoundError:
            return False

    def _refuse(self) -> NoReturn:
        self._lock.close()
        raise UserError(
            f"{self.path}: another run is at work here; wait for it or choose another out"
        )


class WorkFolder(Alone):
    """The same with what is unfinished."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        num_workers: int,
        executor: ExecutorConfig = OWN_WORKERS,
        *,
        progress: bool,
    ) -> None:
        super().__init__(out)
        self.plan = plan
        self.failures: dict[str, Failure] = {}
        """phase/unit -> why it was quarantined in this run."""
        self._num_workers = num_workers
        self._executor = executor
        self._progress = progress

    def __enter__(self) -> "WorkFolder":
        super().__enter__()
        return self

    def start(self, afresh: bool) -> None:
        """Go on, or begin. Work of another plan is said to be so; the ledger counts none of it."""
        if afresh:
            self._clear()
        old = plans.read_plan(self.path / plans.NAME)
        if old is not None and (change := plans.difference(old, self.plan)):
            say(
                f"{self.path}: unfinished work of another plan (changed: {change}); what depends on "
                "that is done again"
            )
        partial = self.path / f"{plans.NAME}.partial"
        partial.write_text(json.dumps(self.plan.model_dump(mode="json"), indent=1))
        partial.rename(self.path / plans.NAME)
        shutil.rmtree(self.path / "failed", ignore_errors=True)
        self._ledger = Ledger(self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def folder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(
        self, phase: str, task: Callable[[Any], Done], jobs: Sequence[Job], bases: Sequence[str]
    ) -> list[Entry]:
        """The entries of every job, in their order, without those that failed.

        ``bases``: for each job the hash of everything that its bytes depend on.
        """
        basis_of = {job.unit: basis for job, basis in zip(jobs, bases, strict=True)}
        found = {unit: self._ledger.done(phase, unit, basis) for unit, basis in basis_of.items()}
        left = [job for job in jobs if found[job.unit] is None]
        if left and len(left) < len(jobs):
            say(f"{self.path}: {len(jobs) - len(left)} of {len(jobs)} units of {phase} are done")
        spool = self.path / "spool" / f"{phase}-{digest(' '.join(bases).encode())}"
        found_now = outcomes(task, left, self._executor, self._num_workers, spool)
        if self._progress:
            found_now = shown(found_now, phase, len(left), size=_documents)
        for job, result in found_now:
            if isinstance(result, Failure):
                self._quarantine(phase, job.unit, result)
                continue
            files = {str(f.relative_to(self.path)): digest_file(f) for f in result.files}
            basis = basis_of[job.unit]
            entry = Entry(phase, job.unit, basis, files, result.tally, result.facts)
            self._ledger.add(entry)
            found[job.unit] = entry
        return [entry for entry in found.values() if entry is not None]

    def _quarantine(self, phase: str, unit: str, failure: Failure) -> None:
        self.failures[f"{phase}/{unit}"] = failure
        name = f"{phase}-{unit}".replace("/", "_")
        if len(name.encode()) > _LONGEST_NAME:
            cut = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
            name = f"{cut}-{digest(name.encode())[:8]}"
        # An error may quote half a surrogate pair.
        text = f"{failure.error}\n\n{failure.trace}"
        (self.folder("failed") / f"{name}.txt").write_text(text, "utf-8", "backslashreplace")
        say(f"{phase} {unit}: failed and set aside ({failure.error})")

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.name == "lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _documents(outcome: tuple[Job, Done | Failure]) -> int:
    return outcome[1].documents if isinstance(outcome[1], Done) else 0


def remove_leftovers(out: Path) -> None:
    """Of a run that was killed after its last rename."""
    shutil.rmtree(out.parent / f".{out.name}.work", ignore_errors=True)


def say(line: str) -> None:
    """One line on stderr."""
    STDERR.print(visible(line), markup=False, highlight=False, soft_wrap=True)
