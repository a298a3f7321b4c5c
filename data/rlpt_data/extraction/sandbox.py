"""Pages through an extractor that may hang, crash or eat memory, without harm to the job.

The extractor runs in a child process with limits of CPU time, memory and page size. A page that
breaks it is a drop that says how: ``extract_timeout`` is not ``extract_crash`` is not
``nothing_extracted``. When early pages fail too often the installation is at fault, not the pages,
and the job stops.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from pydantic import Field

from rlpt_data.extraction.worker import (
    FAILED,
    HEADER,
    NOTHING,
    READY,
    TEXT,
    UNUSABLE,
    send,
)
from rlpt_data.strict import Strict, UserError

PROBATION = 500
"""So many first pages of a unit are watched for a broken extractor."""
MAX_FAILED_SHARE = 0.05
_FREE_FAILURES = 5
_START_SECONDS = 120.0


class LimitsConfig(Strict):
    page_bytes: int = Field(default=16 << 20, ge=1)
    """A longer page is left out unread."""
    cpu_seconds: float = Field(default=20.0, gt=0.0)
    """CPU time one page may take; typical pages take hundredths."""
    wall_seconds: float = Field(default=300.0, gt=0.0)
    """For a page that waits instead of computing."""
    memory_bytes: int = Field(default=2 << 30, ge=0)
    """Address space of the extracting process; 0: no limit."""


@dataclass(frozen=True)
class Outcome:
    """What became of a page: its text, or a reason and its detail."""

    text: str = ""
    reason: str = ""
    detail: str = ""


class _GoneError(Exception):
    """The child ended or was ended; carries the outcome of its page."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Sandbox:
    """A context: ``with Sandbox("trafilatura", limits) as box: box.extract(html)``."""

    def __init__(self, name: str, limits: LimitsConfig) -> None:
        self._name = name
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._seen = 0
        self._failed = 0

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def extract(self, html: str) -> Outcome:
        """The text of a page. Raises UserError when the extractor fails on too many."""
        # No text has NULs, and what parsers do with them differs.
        data = html.replace("\0", "").encode("utf-8", errors="replace")
        if len(data) > self._limits.page_bytes:
            detail = f"{len(data)} bytes of HTML, the limit is {self._limits.page_bytes}"
            return Outcome(reason="too_large", detail=detail)
        outcome = self._asked(data)
        if outcome.reason in ("extract_crash", "extract_timeout"):
            # Once more in a fresh process: the fault may lie in what earlier pages left behind.
            outcome = self._asked(data)
        self._watch(outcome)
        return outcome

    def _asked(self, data: bytes) -> Outcome:
        try:
            return self._ask(data)
        except _GoneError as gone:
            return gone.outcome

    def _ask(self, data: bytes) -> Outcome:
        child = self._started()
        assert child.stdin is not None
        try:
            send(child.stdin, TEXT, data)
        except OSError as error:
            raise self._gone() from error
        kind, found = self._receive(self._limits.wall_seconds)
        text = found.decode("utf-8", errors="replace")
        if kind == TEXT:
            return Outcome(text=text)
        assert kind in (NOTHING, FAILED), kind
        reason = "nothing_extracted" if kind == NOTHING else "extract_error"
        return Outcome(reason=reason, detail=text)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None:
            return self._child
        limits = self._limits
        self._child = subprocess.Popen(
            [
                *(sys.executable, "-m", "rlpt_data.extraction.worker", self._name),
                *(str(limits.cpu_seconds), str(limits.memory_bytes)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            kind, message = self._receive(_START_SECONDS)
        except _GoneError as gone:
            raise UserError(
                f"[source] extractor = {self._name}: does not start ({gone.outcome.detail}); "
                "raise [source.limits] memory_bytes or reinstall it"
            ) from gone
        if kind == UNUSABLE:
            raise UserError(message.decode())
        assert kind == READY, kind
        return self._child

    def _receive(self, seconds: float) -> tuple[int, bytes]:
        deadline = time.monotonic() + seconds
        kind, size = HEADER.unpack(self._read(HEADER.size, deadline))
        return kind, self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._child is not None
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        parts = bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._end()
                raise _GoneError(Outcome(reason="extract_timeout", detail="no answer in wall time"))
            part = os.read(pipe, size - len(parts))
            if not part:
                raise self._gone()
            parts += part
        return bytes(parts)

    def _gone(self) -> _GoneError:
        """The child ended by itself or by a limit; its exit status says which."""
        assert self._child is not None
        code = self._child.wait()
        self._end()
        if code == -signal.SIGPROF:
            detail = f"more than {self._limits.cpu_seconds:g} s of CPU time"
            return _GoneError(Outcome(reason="extract_timeout", detail=detail))
        return _GoneError(Outcome(reason="extract_crash", detail=f"exit status {code}"))

    def _end(self) -> None:
        if self._child is None:
            return
        child, self._child = self._child, None
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            # What was not yet written has nowhere to go.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _watch(self, outcome: Outcome) -> None:
        self._seen += 1
        self._failed += outcome.reason.startswith("extract_")
        allowed = _FREE_FAILURES + MAX_FAILED_SHARE * self._seen
        if self._seen <= PROBATION and self._failed > allowed:
            raise UserError(
                f"[source] extractor = {self._name}: {self._failed} of the first {self._seen} "
                f"pages failed, the last with {outcome.reason} ({outcome.detail}); "
                "mend the installation or choose another extractor"
            )
