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
        self._entries = {(e.phase, e.unit): e for e in map(_entry, self._lines())}

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


def _entry(line: bytes) -> Entry:
    table = json.loads(line)
    return Entry(**{**table, "tally": Tally.from_json(table["tally"])})
