"""Jobs and their outcomes as files, for tasks on machines that share a file system.

    jobs.pickle        the task, the working folder, the jobs of this round
    NAME.begun         a byte for every time the job was begun
    NAME.outcome       what became of it, with the hashes of what it wrote; appears by a rename

NAME is a hash of the job's unit. An outcome counts while its files are what they were.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpt_data.manifest import digest, digest_file
from rlpt_data.store import flush, writer_name
from rlpt_data.workers import attempted


@dataclass(frozen=True)
class Spool:
    """One folder for each pass and basis."""

    folder: Path

    def write(self, task: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        """The jobs of a round; a relative path in them is relative to here."""
        self._save("jobs.pickle", (task, os.getcwd(), list(jobs)))

    def read(self) -> tuple[Callable[[Any], Any], str, list[Any]]:
        return pickle.loads((self.folder / "jobs.pickle").read_bytes())

    def begin(self, unit: str) -> None:
        with self._path(unit, "begun").open("ab") as file:
            file.write(b".")

    def begun(self, unit: str) -> int:
        path = self._path(unit, "begun")
        return path.stat().st_size if path.exists() else 0

    def save(self, unit: str, outcome: Any) -> None:
        """Raises OSError where there is no room for it."""
        hashes = {path: digest_file(path) for path in getattr(outcome, "files", ())}
        self._save(self._path(unit, "outcome").name, (outcome, hashes))

    def arrived(self, units: Iterable[str]) -> list[str]:
        """Those with an outcome; one look at the folder."""
        names = set(os.listdir(self.folder))
        return [unit for unit in units if self._path(unit, "outcome").name in names]

    def outcome(self, unit: str) -> Any:
        """None: none yet, or one whose files have changed since."""
        path = self._path(unit, "outcome")
        if not path.exists():
            return None
        outcome, hashes = pickle.loads(path.read_bytes())
        whole = all(file.is_file() and digest_file(file) == h for file, h in hashes.items())
        return outcome if whole else None

    def forget(self, unit: str) -> None:
        for kind in ("begun", "outcome"):
            self._path(unit, kind).unlink(missing_ok=True)

    def _path(self, unit: str, kind: str) -> Path:
        return self.folder / f"{digest(unit.encode())}.{kind}"

    def _save(self, name: str, value: Any) -> None:
        partial = self.folder / f"{name}.{writer_name()}"
        with partial.open("wb") as file:
            pickle.dump(value, file)
            flush(file)
        partial.rename(self.folder / name)


def work_off(folder: str, _: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """A step of a datatrove pipeline: every ``world_size``-th job of the round, from ``rank`` on."""
    spool = Spool(Path(folder))
    task, directory, jobs = spool.read()
    os.chdir(directory)
    for job in jobs[rank::world_size]:
        if spool.outcome(job.unit) is None:
            spool.begin(job.unit)
            spool.save(job.unit, attempted(task, job))
