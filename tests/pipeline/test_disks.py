"""A disk that is full, and one that may not be written to: real ones, a tmpfs in a namespace of the test's own."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from rlpt import checkpoint, dist
from rlpt.checkpoint import Progress, Saver, saving
from rlpt.observe import CheckpointConfig

SCRIPT = Path(__file__).with_name("in_a_small_disk.sh")
NO_TMPFS = 77


@pytest.fixture
def small_disk(toml: Path, tmp_path: Path, runs):
    """Run the tiny run on a disk of so many kilobytes, then with room, then where nothing may be written."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    toml.write_text(toml.read_text().replace(str(tmp_path / "run"), str(disk / "run")))

    def run(kilobytes: int) -> dict[str, tuple[int, str]]:
        command = [sys.executable, "-m", "rlpt.train", str(toml), "--set", "checkpoint.every=2"]
        words = ["unshare", "-Urm", "sh", str(SCRIPT), str(disk), str(kilobytes), str(out)]
        done = subprocess.run(
            [*words, *command], env=os.environ | runs.ENVIRONMENT, capture_output=True, check=False
        )
        if not (out / "first.code").exists():
            pytest.skip(f"no tmpfs in a namespace here: {done.stderr.decode()}")
        return {
            name: (int((out / f"{name}.code").read_text()), (out / f"{name}.log").read_text())
            for name in ("first", "second", "third")
        }

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [20, 28, 300])
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint_and_no_more(
    small_disk, tmp_path: Path, whole: Path, runs, kilobytes: int
) -> None:
    found = small_disk(kilobytes)
    code, said = found["first"]
    assert code == 1, said[-2000:]
    assert "Traceback" not in said, said[-2000:]
    last = said.strip().splitlines()[-1]
    assert "No space left on device" in last or "bytes" in last, last
    assert found["second"][0] == 0, found["second"][1][-2000:]
    resumed = tmp_path / "out" / "run"
    assert json.dumps(runs.steps_of(resumed)) == json.dumps(runs.steps_of(whole))
    assert runs.thoughts_of(resumed) == runs.thoughts_of(whole)
    code, said = found["third"]
    assert "Traceback" not in said, said[-2000:]
    assert code in (1, 2), said[-2000:]
    assert "Read-only file system" in said


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_ends_nothing(
    world: dist.World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def held(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with closing(Saver(tmp_path, CheckpointConfig(keep_last=1), world)) as saver:
        saver.save(Progress(step=1), {})
        saver.settle()
        monkeypatch.setattr(saving.shutil, "rmtree", held)
        saver.save(Progress(step=2), {})
        saver.settle()
    assert checkpoint.complete_steps(tmp_path) == [1, 2]
    path = checkpoint.path_of(tmp_path, 1)
    assert f"WARNING: {path}: cannot be removed: [Errno 39]" in capsys.readouterr().err
