"""The child of the sandbox: pages in on stdin, texts out on stdout, one at a time.

``python -m rlpt_data.extraction.worker NAME CPU_SECONDS MEMORY_BYTES``. The kernel ends it when a
page takes more CPU time than allowed: the signal tells a timeout from a crash.
"""

import os
import resource
import signal
import struct
import sys
from typing import IO

from rlpt_data.extraction.extractors import Extractor, checked
from rlpt_data.strict import UserError

HEADER = struct.Struct("<BQ")
READY, TEXT, NOTHING, FAILED, UNUSABLE = range(5)


def send(pipe: IO[bytes], kind: int, data: bytes) -> None:
    """One message: its kind, its length, its bytes."""
    pipe.write(HEADER.pack(kind, len(data)))
    pipe.write(data)
    pipe.flush()


def answer(extract: Extractor, html: str, cpu_seconds: float) -> tuple[int, bytes]:
    """The text of one page, under the limit of CPU time."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        text = extract(html)
    except Exception as error:
        # Whatever an extractor raises is about this page: it is counted and the next one comes.
        return FAILED, f"{type(error).__name__}: {error}"[:500].encode(errors="replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if not text:
        return NOTHING, b""
    return TEXT, text.encode("utf-8", errors="replace")


def serve(name: str, cpu_seconds: float, memory_bytes: int) -> None:
    """Answer until stdin ends."""
    # Libraries that print would write into the answers.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        extract = checked(name)
    except UserError as error:
        return send(pipe, UNUSABLE, str(error).encode())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    send(pipe, READY, b"")
    while header := sys.stdin.buffer.read(HEADER.size):
        _, size = HEADER.unpack(header)
        html = sys.stdin.buffer.read(size).decode("utf-8", errors="replace")
        send(pipe, *answer(extract, html, cpu_seconds))


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
