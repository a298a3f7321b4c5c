"""Which units of work are done: one line each, with the checksums of what it wrote.

A line is written after its files are whole and flushed, so a line is a proof. It counts only for the
same ``basis`` (a hash of everything the unit's bytes depend on) and while its files are as they were.
A line that a kill cut off is no line.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpt_data.manifest import digest_file
from rlpt_data.strict import Strict, UserError, json_of, parse
from rlpt_data.tally import Tally


@dataclass(frozen=True)
class Entry:
    """One finished unit of one pass."""

    phase: str
    unit: str
    basis: str
    files: dict[str, str]
    """Name below the work folder -> blake2b-128."""
    tally: Tally
    facts: dict[str, Any]
    """Counters that are no tally: tokens, bytes."""


class Ledger:
    """The lines of a work folder. One process writes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "ledger.jsonl"
        entries = [_entry(line, self._path, n) for n, line in enumerate(self._lines(), start=1)]
        self._entries = {(entry.phase, entry.unit): entry for entry in entries}

    def done(self, phase: str, unit: str, basis: str) -> Entry | None:
        """The entry of a unit that need not be done again; None: do it."""
        entry = self._entries.get((phase, unit))
        if entry is None or entry.basis != basis:
            return None
        whole = all(self._is_whole(name, expected) for name, expected in entry.files.items())
        return entry if whole else None

    def add(self, entry: Entry) -> None:
        """Append a line, flushed to the disk."""
        self._entries[entry.phase, entry.unit] = entry
        table = {**entry.__dict__, "tally": entry.tally.to_json()}
        with self._path.open("ab") as file:
            file.write(json.dumps(table, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _is_whole(self, name: str, expected: str) -> bool:
        path = self._folder / name
        return path.is_file() and digest_file(path) == expected

    def _lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return whole.splitlines()


class _TallyLine(Strict):
    entered: dict[str, int]
    dropped: dict[str, dict[str, int]]
    samples: dict[str, tuple[tuple[str, str], ...]]


class _Line(Strict):
    """An entry on disk."""

    phase: str
    unit: str
    basis: str
    files: dict[str, str]
    tally: _TallyLine
    facts: dict[str, Any]


def _entry(line: bytes, path: Path, number: int) -> Entry:
    where = f"{path}, line {number}"
    try:
        table = json_of(line)
    except ValueError as error:
        raise UserError(f"{where}: damaged: {error}; remove that folder to begin anew") from error
    found = dict(parse(_Line, table, where))
    return Entry(**{**found, "tally": Tally.from_json(found["tally"].model_dump())})
