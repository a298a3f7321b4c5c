"""Inputs that may be anything, for every reader: what is accepted, what is refused in one line, what crashes.

    python launch/faults/fuzz.py [--inputs 100000] [--commands 200] [--seed 0] [--only NAME]... [--write]

The targets are those of tests/fuzz. Each has a process of its own, so that one that dies is a row and not the end; a
crash is printed with its input, and found again by target, seed and number. Some of what readers reject then goes
through the commands of people. `--write` keeps both tables in fuzz.json.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("fuzz", "data")]

from all_targets import targets  # noqa: E402
from commands import COMMANDS, Command, rejected, wrong  # noqa: E402
from fuzzing import Found, Target, fuzz  # noqa: E402
from machine import machine  # noqa: E402
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


def shown(rows: Sequence[dict[str, Any]], title: str) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    names = [name for name in rows[0] if name != "died"]
    for name in names:
        table.add_column(name, justify="left" if name == "target" else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=160).print(table)


def refused(command: Command, count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """The row of one command: how many rejected inputs it got, and to how many its answer was not one line and 2."""
    inputs_at, place = scratch / "inputs", scratch / "place"
    inputs_at.mkdir(parents=True)
    place.mkdir()
    inputs = rejected(command, inputs_at, count, seed)
    failed = list(wrong(command, place, progressed(inputs, command.name)))
    for data, code, said in failed:
        print(f"WRONG {command.name}: exit code {code}\n{data[:300]!r}\n{said[-1500:]}")
    return {"target": command.name, "rejected": len(inputs), "wrong": len(failed)}


def progressed(inputs: Sequence[bytes], name: str) -> Iterator[bytes]:
    with progress(name, len(inputs), 0, show=True) as report:
        for number, data in enumerate(inputs):
            report(number, "")
            yield data


def kept(row: dict[str, Any], seed: int, table: str) -> None:
    """Put a row in the place of the old one of its name."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = {each["target"]: each for each in (*known.get(table, []), row)}
    known |= {name: value for name, value in machine().items() if name != "date"} | {"seed": seed}
    known[table] = [rows[name] for name in sorted(rows)]
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def readers(words: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    for target in targets(scratch):
        if words.inputs and chosen(target.name, words.only):
            yield fuzzed(target, words.inputs, words.seed)


def commands(words: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    for number, command in enumerate(COMMANDS):
        if words.commands and chosen(command.name, words.only):
            yield refused(command, words.commands, words.seed, scratch / f"command_{number}")


def chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(each in name for each in only)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every reader, fed with what it should refuse.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of every target")
    parser.add_argument(
        "--commands", type=int, default=200, help="rejected inputs of every command"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", default=[], help="readers and commands whose name holds it"
    )
    parser.add_argument("--write", action="store_true", help="keep the rows in fuzz.json")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        both = (
            ("targets", "crashes", readers(words, Path(folder))),
            ("commands", "wrong", commands(words, Path(folder))),
        )
        failed = 0
        for table, bad, rows in both:
            found = []
            for row in rows:
                found.append(row | {"date": machine()["date"]})
                failed += row[bad]
                if words.write:
                    kept(found[-1], words.seed, table)
            shown(found, table)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
