"""A job for workers that does what it is told, dying included. Light: every process imports it."""

import os
import signal
from pathlib import Path
from typing import Any

from rlpt_data.strict import UserError


def behave(job: tuple[str, str]) -> str:
    what, path = job
    if what == "raise":
        raise KeyError(what)
    if what == "mistake":
        raise UserError("yours")
    if what == "die" or (what == "die once" and not Path(path).exists()):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return what.upper()


def behave_unit(job: Any) -> str:
    """The same for a job that has a unit."""
    return behave((job.unit, job.path))
