"""Inputs that may be anything, for every reader: what is accepted, what is refused in one line, what crashes.

    python launch/faults/fuzz.py [--inputs 100000] [--seed 0] [--only NAME]... [--write]

The targets are those of tests/fuzz. Each has a process of its own, so that one that dies is a row and not the end; a
crash is printed with its input, and found again by target, seed and number. `--write` keeps the table in fuzz.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("fuzz", "data")]

from all_targets import targets  # noqa: E402
from fuzzing import Found, Target, fuzz  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from rlpt.console import progress  # noqa: E402

RESULTS = Path(__file__).with_name("fuzz.json")


def fuzzed(target: Target, inputs: int, seed: int) -> dict[str, Any]:
    """The row of one target, from a process of its own."""
    forks = multiprocessing.get_context("fork")
    done, answer = forks.Value("q", 0), forks.SimpleQueue()
    child = forks.Process(target=_in_child, args=(target, inputs, seed, done, answer))
    child.start()
    with progress(target.name, inputs, 0, show=True) as report:
        while child.is_alive() and answer.empty():
            report(done.value, "")
            time.sleep(0.2)
    if answer.empty():
        row = Found(target.name, inputs=done.value, crashed=1).row()
        return row | {"died": f"exit code {child.exitcode} at input {done.value - 1}"}
    row, crashes = answer.get()
    child.join()
    for place, (number, data, told) in crashes.items():
        print(f"CRASH {target.name}, input {number}: {place}\n{data[:300]!r}\n{told[-1500:]}")
    return row


def _in_child(target: Target, inputs: int, seed: int, done: Any, answer: Any) -> None:
    def numbers():
        for number in range(inputs):
            done.value = number + 1
            yield number

    found = fuzz(target, numbers(), seed)
    answer.put((found.row(), found.crashes))


def shown(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="fuzzing", title_justify="left")
    names = [name for name in rows[0] if name != "died"]
    for name in names:
        table.add_column(name, justify="left" if name == "target" else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=160).print(table)


def kept(row: dict[str, Any], seed: int) -> None:
    """Put a row in the place of the target's old one."""
    old = json.loads(RESULTS.read_text())["targets"] if RESULTS.exists() else []
    rows = {each["target"]: each for each in (*old, row)}
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "seed": seed}
    found = machine | {"targets": [rows[name] for name in sorted(rows)]}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Every reader, fed with what it should refuse.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of every target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="targets whose name holds it")
    parser.add_argument("--write", action="store_true", help="keep the rows in fuzz.json")
    words = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for target in targets(Path(folder)):
            if words.only and not any(name in target.name for name in words.only):
                continue
            row = fuzzed(target, words.inputs, words.seed) | {"date": str(date.today())}
            rows.append(row)
            if words.write:
                kept(row, words.seed)
    shown(rows)
    sys.exit(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    main()
