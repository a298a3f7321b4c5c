"""Lines to people who may have left: words on stderr are never worth the work that they are about."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""Writing to the rest of a pipe, and to a terminal that is closed."""


@contextmanager
def patient() -> Iterator[None]:
    """From the first words in here that nobody can read any more, stderr leads nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


def tell(line: str) -> None:
    """One line on stderr."""
    with patient():
        print(line, file=sys.stderr, flush=True)


class Patient:
    """The file of a library that draws on stderr itself."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with patient():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with patient():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
