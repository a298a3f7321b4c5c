"""A save costs training a copy; what fails in it is raised at one step, and never at the cost of what was saved."""

import errno
import json
import os
import resource
import shutil
import threading
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlpt import checkpoint, dist
from rlpt.checkpoint import Progress, Saver, faults, folders, saving
from rlpt.exits import FaultError
from rlpt.observe import CheckpointConfig
from rlpt.phases import Clock


@pytest.fixture
def saver(tmp_path: Path, world: dist.World):
    with closing(Saver(tmp_path, CheckpointConfig(keep_last=2), world)) as made:
        yield made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    gate, write = threading.Event(), saving.dcp_save

    def waiting(*words, **options):
        assert gate.wait(20)
        return write(*words, **options)

    monkeypatch.setattr(saving, "dcp_save", waiting)
    return gate


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_PAUSES", (0.0, 0.0, 0.0))


def stored(run_dir: Path, step: int) -> torch.Tensor:
    found = {"part": {"x": torch.zeros(3)}}
    checkpoint.restore(checkpoint.path_of(run_dir, step), found)
    return found["part"]["x"]


def saved(saver: Saver, step: int, value: float = 0.0) -> None:
    saver.save(Progress(step=step), {"part": {"x": torch.full((3,), value)}})
    saver.settle()


def test_what_is_saved_is_what_the_state_was_when_it_was_asked_for(
    saver: Saver, gate: threading.Event, tmp_path: Path
) -> None:
    x, progress = torch.arange(3.0), Progress(step=4, cursor=7)
    saver.save(progress, {"part": {"x": x}})
    x += 10
    progress.cursor = 99
    assert checkpoint.complete_steps(tmp_path) == []
    gate.set()
    saver.settle()
    assert stored(tmp_path, 4).tolist() == [0.0, 1.0, 2.0]
    assert checkpoint.read_progress(checkpoint.path_of(tmp_path, 4)).cursor == 7


def test_one_save_at_a_time_from_one_buffer_by_one_thread(
    saver: Saver, gate: threading.Event, tmp_path: Path
) -> None:
    x, places = torch.zeros(3), set()
    threads = threading.active_count()
    stage = saver.stager.stage

    def noted(state):
        staged = stage(state)
        places.add(staged["part"]["x"].data_ptr())
        return staged

    saver.stager.stage = noted
    saver.save(Progress(step=1), {"part": {"x": x}})
    assert threading.active_count() == threads + 1
    threading.Timer(0.2, gate.set).start()
    x += 1
    saver.save(Progress(step=2), {"part": {"x": x}})
    assert stored(tmp_path, 1).tolist() == [0.0, 0.0, 0.0]
    saver.settle()
    assert stored(tmp_path, 2).tolist() == [1.0, 1.0, 1.0]
    assert len(places) == 1
    assert threading.active_count() == threads


def test_in_the_foreground_the_checkpoint_is_there_when_save_returns(
    tmp_path: Path, world: dist.World
) -> None:
    with closing(Saver(tmp_path, CheckpointConfig(async_save=False), world)) as saver:
        saver.save(Progress(step=3), {"part": {"x": torch.ones(3)}})
        assert checkpoint.complete_steps(tmp_path) == [3]


def test_the_manifest_has_every_file_with_its_size_and_hash(saver: Saver, tmp_path: Path) -> None:
    saver.save(Progress(step=1), {"part": {"x": torch.ones(3)}}, {"supply_0.jsonl.zst": b"rows"})
    saver.settle()
    path = checkpoint.path_of(tmp_path, 1)
    files = json.loads((path / checkpoint.MARKER).read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {checkpoint.MARKER}
    assert set(files) > {".metadata", "progress.json", "supply_0.jsonl.zst"}
    # The hash of these four bytes, by another program (b2sum -l 128).
    assert files["supply_0.jsonl.zst"] == {
        "bytes": 4,
        "blake2b": "f2305e3ea413d261c40604673f9fbe7d",
    }


def test_those_at_the_period_stay_and_of_the_others_the_newest(
    tmp_path: Path, world: dist.World
) -> None:
    cfg = CheckpointConfig(keep_last=2, keep_every=3)
    with closing(Saver(tmp_path, cfg, world)) as saver:
        for step in range(1, 9):
            saved(saver, step)
    assert checkpoint.complete_steps(tmp_path) == [3, 6, 7, 8]


def test_a_checkpoint_is_replaced_only_by_a_complete_one_and_a_damaged_one_is_kept(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(saver, 5, 1.0)
    rename, renamed = Path.rename, []

    def noted(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if path.name == "step_000005.tmp":
            assert (tmp_path / "checkpoints" / "step_000005.replaced" / checkpoint.MARKER).exists()
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", noted)
        saved(saver, 5, 2.0)
    assert renamed[-2:] == ["step_000005", "step_000005.tmp"]
    assert stored(tmp_path, 5).tolist() == [2.0, 2.0, 2.0]
    (checkpoint.path_of(tmp_path, 5) / checkpoint.MARKER).unlink()
    for again in (3.0, 4.0):
        saved(saver, 5, again)
        (checkpoint.path_of(tmp_path, 5) / checkpoint.MARKER).unlink()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000005", "step_000005.damaged", "step_000005.damaged1"]


def test_a_kill_between_the_two_renames_loses_nothing(saver: Saver, tmp_path: Path) -> None:
    saved(saver, 5)
    path = checkpoint.path_of(tmp_path, 5)
    path.rename(path.with_suffix(".replaced"))
    assert checkpoint.newest_intact(tmp_path, saver.world) == 5
    shutil.copytree(path, path.with_suffix(".replaced"))
    assert checkpoint.newest_intact(tmp_path, saver.world) == 5
    assert [found.name for found in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "make the file system writable")],
    ids=["full", "read-only"],
)
def test_a_save_that_fails_is_raised_once_and_keeps_the_last_one(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    saved(saver, 1)

    def failing(*_words, **_options):
        raise OSError(number, os.strerror(number), "somewhere/__0_0.distcp")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "_write_files", failing)
        saver.save(Progress(step=2), {"part": {"x": torch.ones(3)}})
        assert saver.flight is not None
        saver.flight.join()
        with pytest.raises(FaultError, match=rf"somewhere/__0_0.distcp.*errno {number}.*{remedy}"):
            saver.look()
    saver.look()
    assert checkpoint.complete_steps(tmp_path) == [1]
    saved(saver, 3)
    assert checkpoint.complete_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("numbers", [100_000, 20])
def test_a_file_that_may_not_grow_is_named_with_the_system_s_own_error(
    saver: Saver, tmp_path: Path, numbers: int
) -> None:
    """A real one, from the kernel; torch's writer says something else of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        saver.save(Progress(step=1), {"part": {"x": torch.ones(numbers)}})
        with pytest.raises(FaultError, match=rf"__0_0\.distcp.*\(errno {errno.EFBIG}\)"):
            saver.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saved(saver, 1)
    assert checkpoint.complete_steps(tmp_path) == [1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("failures", "number"), [(3, errno.EIO), (4, errno.EIO), (1, errno.EPERM)])
def test_what_may_pass_is_tried_again_three_times_and_said(
    saver: Saver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    failures: int,
    number: int,
) -> None:
    """In the middle of DCP's own writing, which is then done anew."""
    write, calls = saving.Writer.write_data, []

    def failing(self, plan, planner):
        calls.append(1)
        if len(calls) <= failures:
            raise OSError(number, os.strerror(number))
        return write(self, plan, planner)

    monkeypatch.setattr(saving.Writer, "write_data", failing)
    saver.save(Progress(step=1), {"part": {"x": torch.ones(3)}})
    if (failures, number) == (3, errno.EIO):
        saver.settle()
        assert stored(tmp_path, 1).tolist() == [1.0, 1.0, 1.0]
    else:
        with pytest.raises(FaultError, match=f"errno {number}"):
            saver.settle()
    tries = {errno.EIO: min(failures + 1, 4), errno.EPERM: 1}[number]
    assert len(calls) == tries
    assert capsys.readouterr().err.count("tried again") == tries - 1


def test_too_little_room_is_said_before_anything_is_written_or_dropped(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        saved(saver, step)
    record = len(json.dumps(asdict(Progress(step=3))))
    # 1000 float32 of `x`, 8 bytes of `rows` and the progress; a tenth more and 16 MiB.
    needed = int((4008 + record) * 1.1) + 2**24
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda _path: SimpleNamespace(free=needed - 1))
    state = {"part": {"x": torch.ones(1000)}}
    saver.save(Progress(step=3), state, {"rows": b"12345678"})
    with pytest.raises(FaultError, match=rf"needs {needed:,} bytes and {needed - 1:,} are free"):
        saver.settle()
    assert not list((tmp_path / "checkpoints" / "step_000003.tmp").iterdir())
    assert checkpoint.complete_steps(tmp_path) == [1, 2]
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda _path: SimpleNamespace(free=needed))
    saver.save(Progress(step=3), state, {"rows": b"12345678"})
    saver.settle()
    assert checkpoint.complete_steps(tmp_path) == [2, 3]


def test_closing_waits_and_says_what_failed(
    tmp_path: Path, world: dist.World, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def failing(*_words):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(saving, "_write_files", failing)
    with closing(Saver(tmp_path, CheckpointConfig(), world)) as saver:
        saver.save(Progress(step=1), {"part": {"x": torch.ones(3)}})
    assert "errno 28" in capsys.readouterr().err


def test_every_file_and_folder_is_synced_before_the_checkpoint_has_its_name(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced, sizes = os.fsync, [], {}

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sizes[synced[-1].name.removesuffix(".tmp")] = os.fstat(descriptor).st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    (tmp_path / "metrics.jsonl").write_text("a line\n")
    progress = Progress(step=1, journals={"metrics.jsonl": 7, "answers.jsonl": 0})
    saver.save(progress, {"part": {"x": torch.ones(3)}}, {"rows": b"1"})
    saver.settle()
    temporary = tmp_path / "checkpoints" / "step_000001.tmp"
    names = ["progress.json", "rows", "__0_0.distcp", ".metadata.tmp"]
    assert sorted(synced[:4]) == sorted(temporary / name for name in names)
    assert synced[4] == tmp_path / "metrics.jsonl"
    assert synced[5:] == [temporary / checkpoint.MARKER, temporary, temporary.parent]
    path = checkpoint.path_of(tmp_path, 1)
    # All of each: nothing of it was in a buffer still.
    assert all(sizes[file.name] == file.stat().st_size for file in path.iterdir())
    assert folders.defect(path) is None


@pytest.mark.usefixtures("quick")
def test_a_folder_that_has_its_name_is_synced_again_and_not_renamed_again(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failed = saving._sync, []

    def failing(*paths: Path) -> None:
        if [path.name for path in paths] == ["checkpoints"] and not failed:
            failed.append(True)
            raise OSError(errno.EIO, "for a moment")
        sync(*paths)

    monkeypatch.setattr(saving, "_sync", failing)
    saved(saver, 1, 2.0)
    assert failed
    assert stored(tmp_path, 1).tolist() == [2.0, 2.0, 2.0]


def test_what_is_written_and_read_is_a_sign_of_life(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may wait for either longer than it may hang."""
    beats = []
    monkeypatch.setattr(Clock, "beat", lambda _clock: beats.append(1))
    state = {"part": {str(n): torch.zeros(5000) for n in range(4)}}
    saver.write(Progress(step=1), state)
    saver.settle()
    assert len(beats) >= 4
    beats.clear()
    checkpoint.restore(checkpoint.path_of(tmp_path, 1), state)
    assert len(beats) >= 4
    beats.clear()
    assert checkpoint.newest_intact(tmp_path, saver.world) == 1
    assert len(beats) >= 3
