"""What a file system can do to a save: pass after a while, or fail for good."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rlpt.console import say
from rlpt.exits import FaultError

T = TypeVar("T")

_PASSING = {
    *(errno.EAGAIN, errno.EINTR, errno.EIO, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNRESET, errno.EREMOTEIO),
}
"""Numbers that a network file system gives and takes back."""

_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further try."""

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
}


def retried(action: Callable[[], T]) -> T:
    """What ``action`` returns; tried again, and said, where the error may pass. Raises OSError where it stays."""
    for pause in _PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            say(f"checkpoint: {error}; tried again in {pause} s")
            time.sleep(pause)
    return action()


@contextmanager
def faulty(path: Path) -> Iterator[None]:
    """An error of the operating system becomes one line with the file, the number and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "put the file system right")
        raise FaultError(
            f"{error.filename or path}: the checkpoint could not be written: {error.strerror or error} (errno "
            f"{error.errno}); the last complete one is kept: {remedy} and repeat the command"
        ) from error
