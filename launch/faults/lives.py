"""One life of a command: started, perhaps killed, looked for afterwards."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import inject
import psutil

INJECT = Path(__file__).with_name("inject.py")
TOKEN = "RLPT_FAULT_TOKEN"
"""Environment variable that every descendant of a life carries."""
SECONDS_TO_VANISH = 20.0
NONE: Mapping[str, str] = {}


class Life(NamedTuple):
    code: int
    """Of the process: negative where a signal ended it."""
    seconds: float
    hung: bool
    orphans: int
    """Processes that were left when it was over."""


def forked(
    words: Sequence[str], log: Path, limit: float, environment: Mapping[str, str] = NONE
) -> Life:
    """On one rank, from a server that has imported everything: a process of its own within milliseconds."""
    token = uuid4().hex
    child = _server().Process(
        target=_body, args=(list(words), str(log), dict(environment) | {TOKEN: token})
    )
    started = time.monotonic()
    child.start()
    child.join(limit)
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    assert child.exitcode is not None
    return Life(child.exitcode, time.monotonic() - started, hung, left_behind(token))


def launched(
    words: Sequence[str],
    log: Path,
    limit: float,
    ranks: int = 1,
    environment: Mapping[str, str] = NONE,
) -> Life:
    """In a process of its own, or under torchrun in several."""
    token = uuid4().hex
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = several if ranks > 1 else []
    started = time.monotonic()
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, *launcher, str(INJECT), *words],
            env=_quiet() | dict(environment) | {TOKEN: token},
            stdout=file,
            stderr=file,
        )
        try:
            code, hung = child.wait(limit), False
        except subprocess.TimeoutExpired:
            _end(token)
            code, hung = child.wait(), True
    return Life(code, time.monotonic() - started, hung, left_behind(token))


def left_behind(token: str) -> int:
    """How many processes of a life are there, after those that end by themselves have had time to; ends them."""
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while (found := _holding(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _end(token)
    return len(found)


def _end(token: str) -> None:
    for process in _holding(token):
        process.kill()


def _holding(token: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _has(process, token)]


def _has(process: psutil.Process, token: str) -> bool:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and process.environ().get(TOKEN) == token
    except psutil.Error:
        return False


def _quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlpt.train", "rlpt.evaluate.job", "inject"])
    return context


def _body(words: list[str], log: str, environment: dict[str, str]) -> None:
    """In the new process. A fork keeps the environment its server was started with for others to read."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    inject.rlpt(words)
