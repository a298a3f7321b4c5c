"""A bar on stderr for whatever takes long: how many, how fast, how long still. Nothing in a log file."""

from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
STDERR = Console(stderr=True)


def shown(
    items: Iterable[T],
    what: str,
    total: int | None,
    *,
    unit: str = "documents",
    size: Callable[[T], float] = lambda _: 1,
) -> Iterator[T]:
    """The same items; ``size`` says how many ``unit`` each is, for the rate.

    ``total``: how many there are; None: nobody knows, and no time is left to tell.
    """
    if not STDERR.is_terminal or total == 0:
        yield from items
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started, done = monotonic(), 0.0
    with Progress(*columns, console=STDERR, transient=True) as progress:
        line = progress.add_task(what, total=total, rate="")
        for item in items:
            yield item
            done += size(item)
            speed = done / max(1e-9, monotonic() - started)
            progress.update(line, advance=1, rate=f"{speed:,.0f} {unit}/s")
