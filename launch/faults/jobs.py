"""Jobs that are killed: documents into shards, and an evaluation. What they write must be the same bytes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lives import Life, forked, launched
from trial import HANG_SECONDS, Fault, Trial


class JobTrial(Trial):
    """A command with a folder it writes; killed at any time of its life."""

    def __init__(
        self,
        name: str,
        folder: Path,
        seed: int,
        words: Sequence[str],
        out_key: str,
        files: Sequence[str],
        workers: bool = False,
    ) -> None:
        """``out_key``: of its configuration; ``files``: patterns of what is compared."""
        super().__init__(name, folder, seed)
        self.words = words
        self.out_key = out_key
        self.files = files
        self.workers = workers
        self.seconds = 0.0
        self.whole: dict[str, str] = {}

    def undisturbed(self) -> None:
        life = self.life("whole", None)
        if life.code:
            raise SystemExit(
                f"{self.folder}/whole: ended with {life.code}; read {self.log('whole')}"
            )
        self.seconds = life.seconds
        self.whole = self._hashes("whole")
        assert self.whole, self.files

    def fault(self) -> Fault:
        """Most lives are short, so that a job has several."""
        delay = self.draw.uniform(0.0, 0.6 * self.seconds)
        return Fault("any", 0, delay, self.drawn_signal())

    def life(self, name: str, fault: Fault | None) -> Life:
        words = [*self.words, "--set", f"{self.out_key}={self.folder / name}"]
        # Workers are looked for by their environment, which a fork does not show.
        start = launched if self.workers else forked
        return start(words, self.log(name), 2 * HANG_SECONDS, environment=self.environment(fault))

    def struck(self, life: Life, fault: Fault, name: str) -> bool:
        """A job has nothing to save at a signal: it ends as Python does, or as the shell says."""
        return life.code in {-fault.signal, 128 + fault.signal}

    def differences(self, name: str) -> Sequence[str]:
        found = self._hashes(name)
        return [key for key in sorted(found | self.whole) if found.get(key) != self.whole.get(key)]

    def _hashes(self, name: str) -> dict[str, str]:
        out = self.folder / name
        paths = [path for pattern in self.files for path in sorted(out.glob(pattern))]
        return {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
            if path.is_file()
        }
