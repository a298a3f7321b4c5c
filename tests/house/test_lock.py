"""One process at a time in a folder."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlpt import lock
from rlpt_data.strict import UserError


def test_a_second_one_is_refused_and_hears_who_holds_it(tmp_path: Path) -> None:
    with lock.alone(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is at work here") as refused:
            lock.alone(tmp_path / "run").__enter__()
        assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    with lock.alone(tmp_path / "run"):
        pass


def test_an_empty_folder_goes_with_its_holder_and_a_used_one_stays(tmp_path: Path) -> None:
    with lock.alone(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with lock.alone(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


def test_a_file_that_a_killed_one_left_refuses_nobody(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 1, "since": "long ago"}')
    with lock.alone(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_file_that_its_holder_took_away_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def flock(file, how) -> None:
        # Between the opening and the locking its holder ends, and the file goes.
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.alone(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / ".lock").exists()


def test_a_filesystem_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(_file, _how) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.alone(tmp_path):
        pass
    assert "this filesystem has no locks (Operation not supported)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file: cannot be written: File exists; make"),
        lock.alone(tmp_path / "file"),
    ):
        pass


@pytest.mark.slow
def test_the_kernel_frees_it_when_its_holder_is_killed(tmp_path: Path) -> None:
    hold = "import sys, time\nfrom pathlib import Path\nfrom rlpt import lock\n"
    hold += "with lock.alone(Path(sys.argv[1])):\n print('held', flush=True)\n time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        lock.alone(tmp_path).__enter__()
    holder.kill()
    holder.communicate()
    with lock.alone(tmp_path):
        pass
