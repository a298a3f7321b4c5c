"""A run on Weights & Biases: the names and numbers of the run folder, no step twice. The only door to wandb.

`metrics.jsonl` stays the source of truth: what was cut off it when a run goes on from a checkpoint is on wandb
already, and is computed again to the same numbers, so it is not sent again. What wandb itself had not yet written when
the machine or a kill -9 ended it is missing there. `wandb.json` in the run folder keeps the run's id and how far it is.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlpt_data.strict import UserError

Mode = Literal["online", "offline", "disabled"]
FILE = "wandb.json"
GROUP = ("document", "context", "continuation")
ROLLOUT = ("thought", "prediction", "finish", "gain", "reward", "advantage")
"""Columns of the table of rollouts."""


class WandbLog:
    """One process's part of a run."""

    def __init__(self, run_dir: Path, project: str, mode: Mode, config: Mapping[str, Any]) -> None:
        """Raises UserError where wandb is not installed or refuses the run."""
        wandb = _module()
        known = read(run_dir)
        self.known: dict[str, int] = known.get("sent", {})
        self.run = _started(
            wandb,
            project=project,
            name=run_dir.name,
            id=known.get("id"),
            resume="allow",
            mode=mode,
            dir=run_dir,
            config=without_secrets(config),
        )
        self.table = wandb.Table
        # Steps as we count them; wandb's own count calls of log.
        self.run.define_metric("*", step_metric="step")
        _write(run_dir, {"id": self.run.id, "sent": self.known})

    def send(self, journal: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, as a line of ``journal`` has them; what was sent before is not sent again."""
        if step <= self.known.get(journal, -1):
            return
        found = {name: value for name, value in values.items() if value is not None}
        self.run.log({"step": step, **found})

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of the rollouts that people read."""
        table = self.table(columns=[*GROUP, *ROLLOUT], data=list(_lines(rows)))
        self.send("rollouts", step, {"rollouts": table})

    def summary(self, table: Mapping[str, Any]) -> None:
        """The last word of a run: `summary.json`, flat."""
        self.run.summary.update(dict(flat(table)))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of nested tables by dotted names; lists, and tables per domain, stay in the files."""
    for key, value in table.items():
        if isinstance(value, Mapping) and not key.startswith("per_"):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{key}", value


def numbers(table: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of `flat`, for curves."""
    named = ((f"{prefix}{name}", value) for name, value in flat(table))
    return {name: value for name, value in named if not isinstance(value, str)}


def without_secrets(config: Any) -> Any:
    """A configuration without what stands before the @ of an address: a name and a password."""
    if isinstance(config, Mapping):
        return {key: without_secrets(value) for key, value in config.items()}
    if isinstance(config, list):
        return [without_secrets(value) for value in config]
    return re.sub(r"://[^/@\s]*@", "://", config) if isinstance(config, str) else config


def read(run_dir: Path) -> dict[str, Any]:
    """What wandb.json says; empty where the run was never on wandb. Raises UserError where it is damaged."""
    path = run_dir / FILE
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        return {"id": str(known["id"]), "sent": {**known["sent"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged: {error}; remove it, and the run starts anew on wandb"
        ) from error


def remember(run_dir: Path, last: Mapping[str, int]) -> None:
    """Before journals are cut back: how far each of them was, and so the run on wandb."""
    if known := read(run_dir):
        sent = known["sent"]
        sent |= {name: max(step, sent.get(name, -1)) for name, step in last.items()}
        _write(run_dir, known)


def _write(run_dir: Path, known: Mapping[str, Any]) -> None:
    temporary = run_dir / f"{FILE}.tmp"
    temporary.write_text(json.dumps(known))
    temporary.replace(run_dir / FILE)


def _module() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "log.wandb_project is set but wandb is not installed; run `pip install 'rlpt[wandb]'`, or set "
            "log.wandb_mode = 'disabled'"
        ) from error
    return wandb


def _started(wandb: Any, **words: Any) -> Any:
    settings = wandb.Settings(console="off", save_code=False, disable_git=True)
    try:
        return wandb.init(settings=settings, **words)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"log.wandb_mode = {words['mode']!r}: {reason}; log in with `wandb login`, or use 'offline'"
        ) from error


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    for row in rows:
        shared = [row["document"], row["context"], "".join(row["continuation_tokens"])]
        for each in row["rollouts"]:
            yield [*shared, *(each[name] for name in ROLLOUT)]
