"""Lines to people who may have left: words on stderr are never worth the work that they are about."""

import errno
import os
import sys

_GONE = (errno.EPIPE, errno.EIO)
"""Writing to the rest of a pipe, and to a terminal that is closed."""


def tell(line: str) -> None:
    """One line on stderr; from the first that nobody can read there any more, on nothing."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        leave(2)


def leave(descriptor: int) -> None:
    """Let a descriptor lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
