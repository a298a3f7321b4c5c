"""A bar on stderr for whatever takes long: how many, how fast, how long still. Nothing in a log file."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
STDERR = Console(stderr=True)


def shown(
    items: Iterable[T],
    what: str,
    total: int,
    *,
    unit: str = "documents",
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """The same ``total`` items; ``size`` says how many ``unit`` each is, for the rate."""
    if not STDERR.is_terminal or not total:
        yield from items
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started, done = time.monotonic(), 0
    with Progress(*columns, console=STDERR, transient=True) as progress:
        line = progress.add_task(what, total=total, rate="")
        for item in items:
            yield item
            done += size(item)
            speed = done / max(1e-9, time.monotonic() - started)
            progress.update(line, advance=1, rate=f"{speed:,.0f} {unit}/s")
