"""One process at a time in a folder: a lock that the kernel frees, however its holder ends.

`.lock` says who holds it. It goes with its holder, unless that was killed; what it leaves then refuses nobody.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import IO

from rlpt import dist
from rlpt.console import say
from rlpt_data.strict import UserError

NAME = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@contextmanager
def only_one(folder: Path, world: dist.World, name: str = NAME) -> Iterator[None]:
    """Be the only job of a folder, rank 0 on behalf of all. Raises UserError on every rank. Collective.

    Jobs that share a folder have locks of different ``name``.
    """
    with ExitStack() as held:
        lock = alone(folder, name) if world.is_main else nullcontext()
        dist.together(lambda: held.enter_context(lock), world)
        yield


@contextmanager
def alone(folder: Path, name: str = NAME) -> Iterator[None]:
    """Hold a folder. Raises UserError where another process does, naming it, or where nothing can be written there."""
    path = folder / name
    try:
        file = _taken(path)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; make it writable, or choose another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):
            # Only where nothing was put there: a run that was refused leaves no folder.
            folder.rmdir()


def _taken(path: Path) -> IO[str]:
    """The locked file, with our name in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        file = opened.enter_context(path.open("a+"))
        _lock(path, file)
        if not _is_there(path, file):
            return _taken(path)
        file.truncate(0)
        json.dump(_ourselves(), file)
        file.flush()
        opened.pop_all()
        return file


def _lock(path: Path, file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise UserError(_refusal(path, file)) from error
        if error.errno not in _NO_LOCKS:
            raise
        say(
            f"{path}: this filesystem has no locks ({error.strerror}): nothing here keeps a second process out; take "
            "care to start none"
        )


def _is_there(path: Path, file: IO[str]) -> bool:
    """Whoever has just ended may have taken away the file that was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, str | int]:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _refusal(path: Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = "process {pid} on {host}, since {since}".format(**json.load(file))
    except (ValueError, KeyError, TypeError):
        # It has just come, and not written its name yet.
        holder = "its name is not written yet"
    return f"{path.parent}: another process is at work here ({holder}); wait for it or end it, or choose another folder"
