"""How a command ends: 0 success, 2 the user's mistake, 1 a fault, 130 an interrupt, 143 another signal that asks it to.

Bodies raise, and this is the one place that turns what they raised into words and a number. It
imports nothing heavy: a command that fails before its first tensor must fail fast.
"""

import errno
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from rlpt_data.stderr import tell
from rlpt_data.visible import without_passwords

USER_MISTAKE, FAULT, INTERRUPTED, TERMINATED = 2, 1, 130, 143
_LONGEST_LINE = 2000
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)

_AFTER_A_FAULT = (
    "rlpt: a fault, not a mistake of yours. Finished work is kept: repeat the command to go on "
    "from there; if it fails again, report the lines above with the output of `rlpt doctor`."
)


class MistakeError(Exception):
    """A mistake on the command line; what the library refuses is `rlpt_data.strict.UserError`."""


class FaultError(RuntimeError):
    """A fault of the machine or the numbers, in one line: where, what and the remedy."""


class StoppedError(BaseException):
    """Somebody asked the run to end, and it did; like KeyboardInterrupt it is nothing to recover from."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def guarded(body: Callable[[], int | None], *, as_json: bool = False) -> int:
    """Run ``body``, return its exit code or the one its error stands for.

    An error is said on stderr, and with ``as_json`` also as one JSON line on stdout.
    """
    try:
        return body() or 0
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED, as_json)
    except StoppedError as stopped:
        return _report(str(stopped), stopped.code, as_json) if is_main_rank() else stopped.code
    except BrokenPipeError:
        # `rlpt data inspect DIR | head` is no error; stdout is gone, nothing more may reach it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FaultError, FloatingPointError) as error:
        # Raised by checks with where, what and the remedy: a traceback adds nothing.
        return _report(str(error), FAULT, as_json)
    except Exception as error:
        if _is_mistake(error):
            return _report(str(error), USER_MISTAKE, as_json)
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            return _report(_of_the_disk(error), FAULT, as_json)
        if isinstance(error, ModuleNotFoundError) and (remedy := _installation(error.name or "")):
            return _report(f"{error}; {remedy}", USER_MISTAKE, as_json)
        tell(without_passwords(traceback.format_exc()))
        return _report(_AFTER_A_FAULT, FAULT, as_json)


def _of_the_disk(error: OSError) -> str:
    return (
        f"{error.filename or 'a file of this command'}: {error.strerror}; finished work is kept: make room, or the "
        "disk work again, then repeat the command to go on from there"
    )


def _is_mistake(error: Exception) -> bool:
    # Looked up, not imported: an error whose module was never loaded is none of ours.
    strict = sys.modules.get("rlpt_data.strict")
    kinds = (MistakeError, strict.UserError) if strict else (MistakeError,)
    return isinstance(error, kinds)


def _installation(module: str) -> str | None:
    """The command that brings a package which rlpt, or one of its extras, declares; else None."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    name = module.split(".")[0]
    for requirement in map(Requirement, requires("rlpt") or []):
        if requirement.name == name:
            extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker))
            return f'pip install -c constraints.txt -e ".{f"[{extra[1]}]" if extra else ""}"'
    return None


def is_main_rank() -> bool:
    """Is this the process that speaks? Under torchrun there are several."""
    return os.environ.get("RANK", "0") == "0"


def one_line(message: str) -> str:
    """A message as a terminal may show it: what a file or a page put in breaks no line and sends no control codes."""
    flat = without_passwords(" ".join(line.strip() for line in message.splitlines()))
    cut = flat if len(flat) <= _LONGEST_LINE else f"{flat[:_LONGEST_LINE]}..."
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return "".join(shown)


def end_now(message: str, code: int) -> NoReturn:
    """End this process whatever its threads are doing; the kernel and what watches it do the rest."""
    # Even saying so may hang: stderr can be a full pipe or a file on a dead server.
    threading.Timer(1.0, os._exit, (code,)).start()
    os.write(2, f"{_rank()}{message}\n".encode())
    os._exit(code)


def _rank() -> str:
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _report(message: str, code: int, as_json: bool) -> int:
    message = one_line(message)
    tell(f"{_rank()}{message}")
    if as_json and is_main_rank():
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    return code
