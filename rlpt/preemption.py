"""Signals that ask a run to end: SIGTERM, SIGUSR1 (Slurm's warning), SIGHUP (its terminal is gone) and Ctrl-C.

Where there is something to save, the step in hand is finished first and the pipeline leaves by itself; elsewhere the
run ends at once. It never takes longer than its budget: that is kept by a thread, as the main one may sit in native
code, where no Python handler runs.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from rlpt.exits import INTERRUPTED, TERMINATED, StoppedError, end_now, is_main_rank
from rlpt.phases import CLOCK

_CODES = {
    signal.SIGTERM: TERMINATED,
    signal.SIGUSR1: TERMINATED,
    signal.SIGHUP: TERMINATED,
    signal.SIGINT: INTERRUPTED,
}
_ECHO = 1.0
"""Seconds within which a second Ctrl-C is the same one: it reaches a rank from the terminal and from torchrun."""
_QUIT = b"\0"
"""On the wake-up pipe: no signal has this number."""


@dataclass
class Stop:
    """Whether somebody asked this run to end."""

    seconds: float
    asked: int = 0
    """The signal, 0 where there was none."""
    _deferring: bool = False
    _leaving: bool = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal only asks: the body looks at `asked` where it can save, and raises `stopped`."""
        self._deferring = True
        try:
            yield
        except BaseException:
            # What ends the run already is what is told.
            self._leaving = True
            raise
        finally:
            self._deferring = False
        if self.asked:
            raise self.stopped("before the next stage")

    def stopped(self, where: str) -> StoppedError:
        """What ends the run with the signal's exit code. From here on a signal changes nothing."""
        self._leaving = True
        return StoppedError(
            f"stopped {where} after {_name(self.asked)}; repeat the command to go on",
            _CODES[signal.Signals(self.asked)],
        )

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        first, self.asked = not self.asked, self.asked or number
        if self._deferring and first:
            again = ", a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
            _say(
                f"{_name(number)}: the step in hand is finished, then a checkpoint is saved, within {self.seconds:g} s "
                f"(supervision.stop_seconds){again}"
            )
        elif not self._deferring and not self._leaving:
            raise self.stopped("before there was anything new to save")

    def _keep_time(self, pipe: int) -> None:
        asked, began = 0, 0.0
        while True:
            left = max(0.0, began + self.seconds - time.monotonic()) if asked else None
            if not select.select([pipe], [], [], left)[0]:
                self._cut_off(asked)
            number = os.read(pipe, 1)
            if number == _QUIT:
                return
            if number[0] not in _CODES:
                continue
            if not asked:
                asked, began = number[0], time.monotonic()
            elif number[0] == signal.SIGINT and time.monotonic() - began > _ECHO:
                end_now("interrupted twice: the last checkpoint is kept", INTERRUPTED)

    def _cut_off(self, asked: int) -> None:
        end_now(
            f"cut off in phase {CLOCK.phase} after step {CLOCK.step}, {self.seconds:g} s (supervision.stop_seconds) "
            f"after {_name(asked)}; the last checkpoint is kept: repeat the command to go on from it",
            _CODES[signal.Signals(asked)],
        )


@contextmanager
def stoppable(seconds: float) -> Iterator[Stop]:
    """Signals end what runs in here, within ``seconds``. Outside the main thread, where Python has none, none does."""
    stop = Stop(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=stop._keep_time, args=(reader,), name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop._handle) for number in _heeded()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.write(writer, _QUIT)
        thread.join()
        os.close(writer)
        os.close(reader)


def _heeded() -> list[signal.Signals]:
    """All but a hangup that `nohup` has this process ignore."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in _CODES if not (ignored and number == signal.SIGHUP)]


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _say(line: str) -> None:
    # Not through sys.stderr: a signal may come while it is being written to.
    if is_main_rank():
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
