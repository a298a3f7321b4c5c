"""torchrun starts ranks again that were killed, and the run goes on by itself, on as many ranks as are left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
# As launch/train.sh has it for several machines.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
EVERY = ("--set", "checkpoint.every=2")


def agent(toml: Path, *words: str) -> subprocess.Popen[bytes]:
    """One torchrun with its ranks; what it says lies beside the configuration."""
    with (toml.parent / "said").open("ab") as said:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", *words),
                *("-m", "rlpt.train", str(toml), *EVERY),
            ],
            env=os.environ | ENVIRONMENT | ({} if "--standalone" in words else OWN_STORE),
            stdout=subprocess.DEVNULL,
            stderr=said,
        )


def until(toml: Path, step: int, *agents: subprocess.Popen) -> None:
    """Wait until so many steps were taken."""
    metrics = toml.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, (toml.parent / "said").read_text()
        assert all(one.poll() is None for one in agents), (toml.parent / "said").read_text()
        time.sleep(0.01)


def ranks_of(torchrun: subprocess.Popen) -> dict[int, psutil.Process]:
    children = psutil.Process(torchrun.pid).children()
    return {int(one.environ()["RANK"]): one for one in children if "RANK" in one.environ()}


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_is_started_again_and_changes_nothing(
    runs, toml: Path, tmp_path_factory: pytest.TempPathFactory, beside, shards_dir: Path
) -> None:
    torchrun = agent(toml, "--standalone", "--nproc-per-node", "2")
    for step, rank in ((3, 1), (15, 0)):
        until(toml, step, torchrun)
        ranks_of(torchrun)[rank].send_signal(signal.SIGKILL)
        # Behind the restart: the journal has been cut back to the checkpoint before.
        while (toml.parent / "said").read_text().count("resuming") + (rank == 1) < 1:
            time.sleep(0.05)
    assert torchrun.wait(timeout=120) == 0, (toml.parent / "said").read_text()
    alone = beside("conftest").write_run(tmp_path_factory.mktemp("alone"), shards_dir)
    runs.finished(alone, *EVERY, ranks=2)
    assert runs.steps_of(toml.parent / "run") == runs.steps_of(alone.parent / "run")
    assert runs.thoughts_of(toml.parent / "run") == runs.thoughts_of(alone.parent / "run")


@pytest.mark.timeout(300)
def test_a_signal_that_reaches_one_rank_is_obeyed_by_all(runs, toml: Path) -> None:
    torchrun = agent(toml, "--standalone", "--nproc-per-node", "2")
    until(toml, 3, torchrun)
    ranks_of(torchrun)[1].send_signal(signal.SIGUSR1)
    said = toml.parent / "said"
    assert torchrun.wait(timeout=200) == 0, said.read_text()
    (step,) = re.findall(r"\[rank 0\] stopped at step (\d+) after SIGUSR1", said.read_text())
    assert f"at step {step}\n" in said.read_text().split("resuming")[1]
    assert [row["step"] for row in runs.steps_of(toml.parent / "run")] == list(range(1, 21))


@pytest.mark.timeout(300)
def test_a_machine_that_is_lost_leaves_the_run_to_the_others(runs, whole: Path, toml: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        end = f"localhost:{probe.getsockname()[1]}"
    meet = (
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-id", "test"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", end),
    )
    first = agent(toml, *meet, "--rdzv-conf", "last_call_timeout=5,is_host=1")
    second = agent(toml, *meet, "--rdzv-conf", "last_call_timeout=5,is_host=0")
    until(toml, 13, first, second)
    (lost,) = ranks_of(second).values()
    second.kill()
    lost.kill()
    second.wait()
    assert first.wait(timeout=200) == 0, (toml.parent / "said").read_text()
    found = runs.steps_of(toml.parent / "run")
    for row, expected in zip(found, runs.steps_of(whole), strict=True):
        for name in (name for name in expected if name.startswith(("loss/", "reward/"))):
            assert row[name] == pytest.approx(expected[name], abs=1e-5), (row["step"], name)
    assert runs.thoughts_of(toml.parent / "run") == runs.thoughts_of(whole)
