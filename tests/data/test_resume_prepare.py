"""The same bytes for any number of workers, any order of the input, and any moment of a kill."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlpt_data import sources
from rlpt_data.manifest import digest, read_manifest
from rlpt_data.plan import make_plan
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import SPLITS, ShardFolder, verify_folder
from rlpt_data.strict import UserError
from rlpt_data.work import WorkFolder

WORDS = ["river", "stone", "light", "under", "many", "small", "houses", "went", "home", "again"]
Make = Callable[..., PrepareConfig]


class Killed(BaseException):
    """What no code catches."""


def text(number: int) -> str:
    rng = random.Random(number)
    sentences = [" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(12)]
    return " ".join(sentences)


def near(number: int) -> str:
    """Nearly the text of another number: one word in a hundred differs."""
    return text(number).replace("again", "Again", 1)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files with pages, repetitions and broken lines."""
    folder = tmp_path_factory.mktemp("resume") / "pages"
    folder.mkdir()
    for file in range(5):
        texts = [text(number) for number in range(file * 15, file * 15 + 15)]
        texts += [text(file * 7), near(file * 11), " "]
        rows = [{"text": t, "url": f"https://s{n % 4}.org/{file}/{n}"} for n, t in enumerate(texts)]
        lines = [json.dumps(row) for row in rows] + ["{"]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def configuration(out: Path, pages: Path, **changes: Any) -> PrepareConfig:
    table = {
        "out": out,
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": pages},
        "stages": [{"kind": "near-duplicates"}],
        "tokenizer": {"kind": "bpe", "vocab_size": 280},
        "cuts": {"min_context": 8, "min_continuation": 8},
        "split": {"dev": 0.1, "test": 0.1},
        "num_shards": 3,
    }
    return PrepareConfig.model_validate_json(json.dumps(table | changes, default=str))


@pytest.fixture
def make(tmp_path: Path, pages: Path) -> Make:
    """A configuration for any output."""
    return lambda name, **changes: configuration(tmp_path / name, pages, **changes)


@pytest.fixture(scope="module")
def whole(pages: Path) -> dict[str, bytes]:
    """What one process writes that nothing interrupts."""
    return run(configuration(pages.parent / "whole", pages))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rows(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """document id -> split and cuts."""
    opened = ShardFolder.open(folder)
    return {
        row.document_id: (name, row.cuts.tolist()) for name in SPLITS for row in opened.split(name)
    }


def run(config: PrepareConfig) -> dict[str, bytes]:
    prepare(config, progress=False)
    return contents(config.out)


def test_two_workers_write_the_bytes_of_one(make: Make, whole: dict[str, bytes]) -> None:
    assert run(make("two", workers=2)) == whole


def test_the_order_of_the_input_files_has_no_part_in_any_byte(
    make: Make, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = sources.units
    monkeypatch.setattr(sources, "units", lambda config: listed(config)[::-1])
    assert run(make("backward")) == whole


def test_another_number_of_shards_keeps_documents_cuts_and_split(make: Make) -> None:
    three, seven, one = (make(str(n), num_shards=n) for n in (3, 7, 1))
    for config in (three, seven, one):
        prepare(config, progress=False)
    assert rows(three.out) == rows(seven.out) == rows(one.out)
    files = [entry.path for entry in read_manifest(seven.out).files]
    assert sum(path.startswith("train/") for path in files) == 7
    ids = [list(ShardFolder.open(c.out).split("train").document_ids) for c in (three, seven, one)]
    assert ids[0] == ids[1] == ids[2]


def test_stages_account_for_every_document(make: Make) -> None:
    manifest = prepare(make("out"), progress=False)
    assert manifest.stages is not None
    table = {row["stage"]: row for row in manifest.stages}
    for first, second in zip(manifest.stages, manifest.stages[1:], strict=False):
        assert first["out"] == second["in"], (first["stage"], second["stage"])
    for row in manifest.stages:
        assert row["in"] - sum(row["dropped"].values()) == row["out"]
    assert table["read"]["in"] == 5 * 19
    assert table["read"]["dropped"] == {"bad_json": 5}
    assert table["empty"]["dropped"] == {"empty": 5}
    assert table["duplicates"]["dropped"] == {"duplicate": 5}
    assert table["near-duplicates"]["dropped"]["near_duplicate"] == 5
    assert table["encode"]["out"] == sum(c.documents for c in manifest.counts.values()) == 75
    verify_folder(make("out").out)


def test_a_run_killed_before_any_flush_or_rename_goes_on_to_the_same_bytes(
    make: Make, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("killed")
    renamed, synced = Path.rename, os.fsync
    left = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments)

        return call

    monkeypatch.setattr(Path, "rename", deadly(renamed))
    monkeypatch.setattr(os, "fsync", deadly(synced))
    deaths = 0
    while True:
        left = 3 + deaths
        try:
            prepare(config, progress=False)
            break
        except Killed:
            deaths += 1
    # Without a memory of what is done it would never end.
    assert deaths > 10
    assert contents(config.out) == whole
    assert not list(config.out.parent.glob(".killed*"))


def test_finished_units_are_not_read_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read = make("out"), sources.read
    seen: list[str] = []

    def third_time_killed(source: Any, unit: Any) -> Any:
        seen.append(unit.name)
        if len(seen) == 3:
            raise Killed
        return read(source, unit)

    monkeypatch.setattr(sources, "read", third_time_killed)
    with pytest.raises(Killed):
        prepare(config, progress=False)
    prepare(config, progress=False)
    assert seen == ["0.jsonl", "1.jsonl", "2.jsonl", "2.jsonl", "3.jsonl", "4.jsonl"]


def interrupted(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a work folder in which reading is done."""

    def stop(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("rlpt_data.prepare.tokenizer_of", stop)
        with pytest.raises(Killed):
            prepare(config, progress=False)


@pytest.mark.parametrize("what", ["input", "version", "output"])
def test_what_changed_since_the_kill_is_said_and_done_again(
    tmp_path: Path,
    pages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    own = shutil.copytree(pages, tmp_path / "pages")
    config = configuration(tmp_path / "out", own)
    interrupted(config, monkeypatch)
    work = config.out.parent / ".out.work"
    if what == "input":
        path = own / "1.jsonl"
        path.write_text(path.read_text() + "\n{")
    elif what == "version":
        monkeypatch.setattr("rlpt_data.plan.LIBRARIES", ("numpy",))
    else:
        # A store that is not what the ledger says, and is as long.
        path = work / "read" / f"{digest(b'1.jsonl')}.docs"
        path.write_bytes(path.read_bytes().replace(b"river", b"RIVER", 1))
    found = run(config)
    error = " ".join(capsys.readouterr().err.split())
    told = {"input": "input 1.jsonl", "version": "version of", "output": "4 of 5 units of read"}
    assert told[what] in error
    assert found == run(configuration(tmp_path / "fresh", own))


def test_two_runs_in_one_folder_are_refused(make: Make) -> None:
    config = make("out")
    plan = make_plan([], {}, {})
    with (
        WorkFolder(config.out, plan, num_workers=1, progress=False),
        pytest.raises(UserError, match="another run is at work here"),
    ):
        prepare(config, progress=False)
    prepare(config, progress=False)


def test_a_filesystem_without_locks_is_said(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(_file, _how) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    prepare(make("out"), progress=False)
    said = " ".join(capsys.readouterr().err.split())
    assert "this filesystem has no locks (Operation not supported): take care" in said


def test_a_unit_that_cannot_be_read_is_set_aside_and_tried_again(
    make: Make,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, read = make("out", max_failed_share=0.2), sources.read

    def unreadable(source: Any, unit: Any) -> Any:
        if unit.name == "2.jsonl":
            raise PermissionError(errno.EACCES, "no permission", "2.jsonl")
        return read(source, unit)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read", unreadable)
        manifest = prepare(config, progress=False)
        with pytest.raises(UserError, match=r"1 of 5 units cannot be read, e\.g\. read/2\.jsonl"):
            prepare(make("strict"), progress=False)
    assert manifest.drops["failed_unit"] == 1
    failed = config.out.parent / ".out.work/failed/read-2.jsonl.txt"
    assert "PermissionError" in failed.read_text()
    assert "set aside (PermissionError" in " ".join(capsys.readouterr().err.split())
    assert run(config) == whole
    assert run(make("strict")).keys() == whole.keys()


def test_a_full_disk_stops_with_one_line_and_nothing_is_lost(
    make: Make, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("out")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; make room and run"):
            prepare(config, progress=False)
    assert run(config) == whole


def test_a_full_disk_is_the_same_line_where_the_ledger_or_the_order_is_written(
    make: Make, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

    for place in ("rlpt_data.ledger.Ledger.add", "rlpt_data.order.np.save"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(
                UserError, match=r"^here: No space left on device; make room and run"
            ):
                prepare(config, progress=False)
    assert run(config) == whole


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_twenty_kills_of_the_process_itself_change_nothing(
    make: Make, whole: dict[str, bytes], num_workers: int
) -> None:
    config = make("killed", workers=num_workers)
    program = (
        "import sys; from rlpt_data.prepare import PrepareConfig, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(PrepareConfig.model_validate_json(sys.argv[1]), progress=False)\n"
    )
    script = config.out.parent / "run.py"
    script.write_text(program)
    command = [sys.executable, str(script), config.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = time.monotonic()
    subprocess.run(
        [*command[:-1], make("timed", workers=num_workers).model_dump_json()],
        env=environment,
        check=True,
    )
    seconds = time.monotonic() - started
    draw, kills = random.Random(num_workers), 0
    while kills < 20:
        process = subprocess.Popen(command, env=environment)
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if (config.out / "manifest.json").exists():
            assert contents(config.out) == whole
            subprocess.run(["rm", "-r", str(config.out)], check=True)
    subprocess.run(command, env=environment, check=True)
    assert contents(config.out) == whole
