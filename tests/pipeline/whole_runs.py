"""Whole runs, in processes of their own where that matters, and what they leave behind."""

import io
import json
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard

from rlpt import checkpoint, session
from rlpt.checkpoint import folders
from rlpt.cli import main as command_line
from rlpt.config import RunConfig
from rlpt.train import run

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def started(toml: Path, *words: str, ranks: int = 1) -> subprocess.Popen[bytes]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "rlpt.train", str(toml), *words]
    return subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(toml: Path, *words: str, ranks: int = 1, code: int = 0, here: bool = True) -> str:
    """What a run that ends by itself says on stderr; on one rank in this process, which saves a start.

    Types of arguments are checked ``here``, and compiled code has others.
    """
    if ranks == 1 and here:
        return _called(toml, *words, code=code)
    process = started(toml, *words, ranks=ranks)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == code, errors.decode()[-3000:]
    return errors.decode()


def _called(toml: Path, *words: str, code: int) -> str:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as left:
            command_line(["train", str(toml), *words])
    assert left.value.code == code, said.getvalue()[-3000:]
    return said.getvalue()


def cut_off_and_resumed(cfg: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted behind its checkpoint of ``step``, and goes on."""
    save = session.Session.save

    def killed(self, progress, work) -> None:
        save(self, progress, work)
        if progress.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session.Session, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    run(cfg)


def steps_of(run_dir: Path, drop: tuple[str, ...] = ("time/", "throughput/")) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows]


def weights_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The policy's tensors, read without any model."""
    path = checkpoint.path_of(run_dir, step)
    reader = dcp.FileSystemReader(path)
    shapes = {
        k: v
        for k, v in reader.read_metadata().state_dict_metadata.items()
        if k.startswith("policy.")
    }
    tensors = {name: torch.empty(meta.size) for name, meta in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def sealed(path: Path) -> None:
    """Make the marker of a checkpoint fit its files again: what was changed in them is what was saved."""
    names = [file.name for file in path.iterdir() if file.name != checkpoint.MARKER]
    entries = {name: folders.entry_of(path / name) for name in names}
    (path / checkpoint.MARKER).write_text(folders.marker_text(entries))


def thoughts_of(run_dir: Path) -> list[tuple]:
    rows = []
    for path in sorted((run_dir / "rollouts").glob("*.zst")):
        lines = zstandard.decompress(path.read_bytes()).decode().splitlines()
        rows += [
            (row["document"], row["cut"], r["ids"], r["finish"])
            for row in map(json.loads, lines)
            for r in row["rollouts"]
        ]
    return rows
