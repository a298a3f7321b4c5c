"""What a file system can do to a save: pass after a while, or fail for good."""

import errno
import shutil
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

_ROOM = 2**24
"""Bytes that a checkpoint leaves, and those that its tensors' headers take."""

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
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


def check_space(path: Path, needed: int) -> None:
    """Raises FaultError where the file system of ``path`` has less room than ``needed`` bytes and some."""
    wanted, free = int(needed * 1.1) + _ROOM, shutil.disk_usage(path).free
    if free < wanted:
        raise FaultError(
            f"{path}: a checkpoint needs {wanted:,} bytes and {free:,} are free; nothing was written, the last "
            "complete one is kept: free some space there (`rlpt checkpoint prune`) and repeat the command"
        )


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
