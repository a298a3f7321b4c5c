"""Engine processes that a trainer starts: as many as it needs, none left when it ends, however it ends."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rlpt.phases import CLOCK
from rlpt.rollout.client import EngineDownError
from rlpt.rollout.serve import TOKEN
from rlpt.rollout.wire import EngineSpec
from rlpt_data.strict import UserError


@dataclass
class EngineProcess:
    """One engine on this machine, reached over loopback at a port that the system chose."""

    spec: EngineSpec
    log: Path
    token: str
    threads: int | None = None
    device: str | None = None
    """CUDA_VISIBLE_DEVICES of the process."""
    start_seconds: float = 300.0
    address: str = ""
    starts: int = 0
    _process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def scratch(self) -> Path:
        """What vLLM leaves in its temporary folder; no other engine's."""
        return self.log.with_suffix("")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start without waiting: several load side by side."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlpt.rollout.serve"],
                bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=self._environment(),
                # Ctrl-C is for the trainer: it decides when its engines end.
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin
        first = {
            "spec": self.spec.model_dump(),
            "host": "127.0.0.1",
            "port": 0,
            "parent": os.getpid(),
        }
        self.starts += 1
        # One that is dead already is found out by `wait`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write((json.dumps(first) + "\n").encode())

    def _environment(self) -> dict[str, str]:
        """The rank's own place in the process group is none of the engine's business."""
        group = (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "GROUP_RANK",
        )
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in group and "TORCHELASTIC" not in name
        }
        kept |= {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        kept |= {TOKEN: self.token, "TMPDIR": str(self.scratch.resolve())}
        chosen = {"OMP_NUM_THREADS": self.threads, "CUDA_VISIBLE_DEVICES": self.device}
        return kept | {name: str(value) for name, value in chosen.items() if value is not None}

    def wait(self) -> None:
        """Until it listens. Raises UserError for what it refused, EngineDownError where it died or took too long."""
        line = self._first_line(time.monotonic() + self.start_seconds)
        found = json.loads(line or b"{}")
        if "address" in found:
            self.address = found["address"]
            return
        code = self._ended()
        if code == 2 and "error" in found:
            raise UserError(found["error"])
        reason = found.get("error") or f"it ended with exit code {code}"
        raise EngineDownError(f"engine did not start: {reason}; its log is {self.log}")

    def _first_line(self, deadline: float) -> bytes:
        assert self._process
        assert self._process.stdout
        text = b""
        descriptor = self._process.stdout.fileno()
        while not text.endswith(b"\n"):
            # It is this deadline that ends the wait, not the watchdog's.
            CLOCK.beat()
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise EngineDownError(
                    f"engine did not start within {self.start_seconds:g} s (engine.vllm.start_seconds); "
                    f"its log is {self.log}"
                )
            if select.select([descriptor], [], [], min(left, 1.0))[0]:
                part = os.read(descriptor, 65536)
                if not part:
                    return text
                text += part
        return text

    def _ended(self) -> int | None:
        assert self._process
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, then make it."""
        if self._process is None:
            return
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=seconds)
        self.kill()

    def kill(self) -> None:
        """At once, with everything it may have started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        shutil.rmtree(self.scratch, ignore_errors=True)
