"""The files of a run as they grow -> what is known of it now. Every number of the view is one of theirs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlpt.report.run import evaluation_row, metrics_row, read_dump, read_object
from rlpt.report.shapes import CONFIG, SUMMARY
from rlpt.rows import Row, journal_row
from rlpt_data.strict import UserError


class Follower:
    """A journal that grows, and that a resumed run cuts back."""

    def __init__(self, path: Path, row_of: Callable[[bytes], Row] = journal_row) -> None:
        self.path = path
        self._row_of = row_of
        self._forget()

    def _forget(self) -> None:
        self.rows: list[Row] = []
        self.damaged = 0
        self._at, self._last = 0, b""

    def poll(self) -> list[Row]:
        """All rows so far; a line without its end is still being written and waits."""
        if not self.path.is_file():
            self._forget()
            return self.rows
        with self.path.open("rb") as file:
            # Cut back and grown again, the file may be as long as before: its last line tells.
            file.seek(self._at - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._forget()
            file.seek(self._at)
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self._take(line)
        return self.rows

    def _take(self, line: bytes) -> None:
        self._at, self._last = self._at + len(line), line
        try:
            self.rows.append(self._row_of(line))
        except ValueError:
            self.damaged += 1


@dataclass
class Known:
    """A run at one moment."""

    name: str
    config: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    group: Row | None = None
    """The newest dumped group."""
    summary: Row | None = None
    """Of a finished run."""
    silent_seconds: float | None = None
    """Since a line was added; None where there is none."""
    damaged: int = 0

    @property
    def last(self) -> Row:
        return self.metrics[-1] if self.metrics else {}

    @property
    def state(self) -> str:
        """finished, running or not started, as far as files can tell."""
        if self.summary is not None and self.summary.get("steps") == self.last.get("step"):
            return "finished"
        return "running" if self.metrics or self.evaluations else "not started"

    @property
    def stage(self) -> Row:
        """The configuration of the stage in hand; empty before the first step."""
        stages = self.config.get("stage") or []
        return next((stage for stage in stages if stage.get("name") == self.last.get("stage")), {})

    @property
    def stage_step(self) -> int:
        """Steps taken in the stage in hand."""
        return sum(row.get("stage") == self.last.get("stage") for row in self.metrics)

    def recent(self, count: int = 20) -> Sequence[Row]:
        """The last steps of the stage in hand."""
        return [row for row in self.metrics if row.get("stage") == self.last.get("stage")][-count:]

    @property
    def seconds_left(self) -> float | None:
        """To the end of the stage, at the pace of the last steps, evaluations not counted; None where nobody can
        tell.
        """
        steps = self.stage.get("steps")
        paces = [row["time/step"] for row in self.recent() if row.get("time/step")]
        if steps is None or not paces:
            return None
        return max(0, steps - self.stage_step) * sum(paces) / len(paces)


class Watched:
    """A run folder, looked at again and again."""

    def __init__(self, run_dir: Path) -> None:
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"{run_dir}: is a file; give the run_dir of a configuration")
        self.dir = run_dir
        self.metrics = Follower(run_dir / "metrics.jsonl", metrics_row)
        self.evaluations = Follower(run_dir / "evaluations.jsonl", evaluation_row)
        self._dump: tuple[tuple[str, int], Row | None] = (("", 0), None)

    def look(self) -> Known:
        """What the files say now."""
        metrics, evaluations = self.metrics.poll(), self.evaluations.poll()
        return Known(
            self.dir.resolve().name,
            read_object(self.dir / "config.json", "", [], CONFIG),
            metrics,
            evaluations,
            self._newest_group(),
            read_object(self.dir / "summary.json", "", [], SUMMARY) or None,
            self._silence(),
            self.metrics.damaged + self.evaluations.damaged,
        )

    def _silence(self) -> float | None:
        paths = (self.metrics.path, self.evaluations.path)
        times = [path.stat().st_mtime for path in paths if path.is_file()]
        return max(0.0, time.time() - max(times)) if times else None

    def _newest_group(self) -> Row | None:
        paths = sorted((self.dir / "rollouts").glob("step_*.jsonl.zst"))
        if not paths:
            return None
        seen = (paths[-1].name, paths[-1].stat().st_size)
        if seen != self._dump[0]:
            # Caught half written it is damaged; it will have another size when it is whole.
            rows = read_dump(paths[-1], [])
            self._dump = (seen, rows[-1] if rows else None)
        return self._dump[1]
