"""`rlpt watch`: a run in the terminal while it trains. It reads the run's files and touches nothing."""

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpt.watch.following import Known, Watched
from rlpt.watch.frame import alarms, frame

_NUMBERS = ("reward/mean", "gain/mean", "loss/next_token", "thought/length", "time/step")


def watch(run_dir: Path, once: bool, every: float) -> dict[str, Any]:
    """Show ``run_dir`` until q or ctrl-C, anew every ``every`` seconds; ``once``, and where stdout is no terminal, one
    picture. Returns its numbers. Raises UserError for a file.
    """
    from rich.console import Console

    watched = Watched(run_dir)
    if once or not sys.stdout.isatty():
        known = watched.look()
        # A pipe has no width of its own, and rich would fold at 80.
        Console(width=None if sys.stdout.isatty() else 120).print(frame(known))
        return numbers(known)
    return numbers(_live(watched, every))


def _live(watched: Watched, every: float) -> Known:
    from rich.live import Live

    known = watched.look()
    with Live(frame(known), screen=True, auto_refresh=False) as live, _keys():
        try:
            while not _asked_to_leave(every):
                known = watched.look()
                live.update(frame(known), refresh=True)
        except KeyboardInterrupt:
            pass
    return known


def numbers(known: Known) -> dict[str, Any]:
    """What one picture says, for machines."""
    last = known.evaluations[-1] if known.evaluations else None
    return {
        "run": known.name,
        "state": known.state,
        "stage": known.last.get("stage"),
        "step": known.last.get("step"),
        "stage_step": known.stage_step,
        "stage_steps": known.stage.get("steps"),
        "seconds_left": known.seconds_left,
        "metrics": {name: known.last[name] for name in _NUMBERS if name in known.last},
        "evaluation": last
        and {
            "step": last["step"],
            "verdict": last["summary"].get("verdict"),
            "gain_heldout": last["summary"].get("gain_heldout"),
        },
        "alarms": alarms(known),
        "damaged_lines": known.damaged,
    }


@contextmanager
def _keys() -> Iterator[None]:
    """Keys arrive one by one, unseen; as before at the end. Nothing to do where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _asked_to_leave(seconds: float) -> bool:
    """Wait; True at once where q was pressed."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            pressed = os.read(sys.stdin.fileno(), 32)
            # Nothing to read is the end of the terminal.
            if not pressed or b"q" in pressed.lower():
                return True
    return False
