"""Rejected inputs through the commands that read them: exit code 2, one line, no traceback."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import config_targets
import run_targets
import shard_targets
from fuzzing import fuzz

from rlpt import cli
from rlpt.exits import USER_MISTAKE

QUICKSTART = config_targets.ROOT / "configs/train/quickstart.toml"
_ATTEMPTS = 60
"""Inputs that are made for each one that is rejected and of the kind that is asked for."""


@dataclass(frozen=True)
class Command:
    name: str
    module: ModuleType
    target: str
    given: Callable[[Path, bytes], list[str]]
    """The words of the command for an input, written to a file in the folder where it is one."""
    job: int | None = None
    """Of the target `config: jobs` the kind of job."""


def _file(name: str, *words: str, folder: bool = False) -> Callable[[Path, bytes], list[str]]:
    def given(place: Path, data: bytes) -> list[str]:
        (place / name).write_bytes(data)
        return [*words, str(place if folder else place / name)]

    return given


def _override(_place: Path, data: bytes) -> list[str]:
    return ["train", "--dry-run", str(QUICKSTART), "--set", data.decode("utf-8", "surrogateescape")]


def _tokenizer(place: Path, data: bytes) -> list[str]:
    (place / "tokenizer.json").write_bytes(data)
    (place / "corpus").mkdir(exist_ok=True)
    for n in range(80):
        (place / "corpus" / f"{n}.txt").write_text(f"Words of document {n}.\n" * 40)
    # What is half done is taken up again, and said.
    shutil.rmtree(place / ".shards.work", ignore_errors=True)
    (place / "prepare.toml").write_text(
        f'out = "{place / "shards"}"\nwithout_decontamination = true\n'
        f'[source]\nkind = "folder"\npath = "{place / "corpus"}"\n'
        f'[tokenizer]\nkind = "file"\npath = "{place / "tokenizer.json"}"\n'
    )
    return ["data", "prepare", str(place / "prepare.toml")]


_TABLES = ("config: run", "config: jobs")
COMMANDS = (
    Command("train", config_targets, _TABLES[0], _file("c.toml", "train", "--dry-run")),
    Command("train --set", config_targets, "config: --set", _override),
    Command("engine", config_targets, _TABLES[0], _file("c.toml", "engine")),
    Command("eval", config_targets, _TABLES[1], _file("c.toml", "eval"), job=0),
    Command("compare", config_targets, _TABLES[1], _file("c.toml", "compare"), job=2),
    Command("downstream", config_targets, _TABLES[1], _file("c.toml", "downstream"), job=3),
    Command("data index", config_targets, _TABLES[1], _file("c.toml", "data", "index"), job=4),
    Command("data prepare", config_targets, _TABLES[1], _file("c.toml", "data", "prepare"), job=5),
    Command("data prepare, tokenizer", shard_targets, "tokenizer.json", _tokenizer),
    Command(
        *("data verify", shard_targets, "shards: manifest.json"),
        _file("manifest.json", "data", "verify", folder=True),
    ),
    Command(
        *("fit, table", run_targets, "fit: table"),
        _file("table.csv", "fit", "--x", "flops", "--y", "gain"),
    ),
    Command(
        *("fit, ladder", run_targets, "fit: ladder"), _file("ladder.json", "fit", "--x", "flops")
    ),
)


def rejected(command: Command, scratch: Path, count: int, seed: int = 0) -> list[bytes]:
    """Up to ``count`` inputs that the reader of a command rejects."""
    target = next(each for each in command.module.targets(scratch) if each.name == command.target)
    found = fuzz(target, range(_ATTEMPTS * count), seed, kept=_ATTEMPTS * count).refused
    if command.job is not None:
        found = [data[1:] for data in found if data[0] == command.job]
    return found[:count]


def called(words: list[str]) -> tuple[int, str]:
    """Exit code of a command, and what it says on stderr."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            cli.main(words)
        except SystemExit as left:
            return int(left.code or 0), said.getvalue()
    raise AssertionError("a command exits")


def wrong(command: Command, folder: Path, inputs: list[bytes]) -> Iterator[tuple[bytes, int, str]]:
    """Those inputs, with exit code and words, that are not refused as they should be."""
    for data in inputs:
        code, said = called(command.given(folder, data))
        if code != USER_MISTAKE or len(said.splitlines()) != 1 or "Traceback" in said:
            yield data, code, said
