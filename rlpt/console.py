"""Progress on stderr: a bar in a terminal, a line now and then in a log file, nothing on ranks other than 0."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rlpt_data.stderr import Patient, tell
from rlpt_data.visible import visible

Report = Callable[[int, str], None]
"""(steps done, what to say beside the bar)."""

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(title: str, total: int, done: int, show: bool) -> Iterator[Report]:
    """A bar over ``total`` steps of which ``done`` are behind us."""
    if not show:
        yield lambda _done, _text: None
    elif sys.stderr.isatty():
        yield from _bar(title, total, done)
    else:
        yield _lines(title, total)


def _bar(title: str, total: int, done: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(file=cast(TextIO, Patient(sys.stderr)))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda now, note: bar.update(task, completed=now, note=note)


def _lines(title: str, total: int) -> Report:
    last = [0.0]

    def report(done: int, note: str) -> None:
        now = time.monotonic()
        if done == total or now - last[0] >= _SECONDS_BETWEEN_LINES:
            last[0] = now
            tell(f"{title} {done}/{total}  {note}")

    return report


def say(text: str, show: bool = True) -> None:
    """One line on stderr."""
    if show:
        tell(visible(text))


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_log(name: str, show: bool) -> None:
    """From now on a library's notes are lines like our own: what it chose by itself is seen."""
    log = logging.getLogger(name)
    if show and not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines())
        log.setLevel(logging.INFO)
