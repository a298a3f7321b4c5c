"""`rlpt train`, one rank of which hangs: HANG='{"rank": 1, "step": 12, "how": "sleep"}' hanging_rank.py CONFIG

`sleep` is one that Python can still speak for, `stop` a process that the kernel has stopped, `native` code that holds
the interpreter and never comes back.
"""

import ctypes
import json
import os
import signal
import sys
import time

from rlpt.cli import main
from rlpt.phases import CLOCK
from rlpt.supply import Supply

HANG = json.loads(os.environ["HANG"])


def sleeps_for_ever() -> None:
    while True:
        time.sleep(1000)


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def never_returns() -> None:
    # Called with the interpreter held. Locked twice, it waits for itself.
    mutex, native = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    native.pthread_mutex_lock(mutex)
    native.pthread_mutex_lock(mutex)


def hang(take):
    def taken(self, step: int, *rest):
        if CLOCK.step + 1 == HANG["step"] and int(os.environ.get("RANK", "0")) == HANG["rank"]:
            {"sleep": sleeps_for_ever, "stop": stops, "native": never_returns}[HANG["how"]]()
        return take(self, step, *rest)

    return taken


if __name__ == "__main__":
    Supply.take = hang(Supply.take)
    main(["train", *sys.argv[1:]])
