"""The launch scripts hand signals on, say how it ended, and put a job back into the queue only where it is to go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlpt.observe import SupervisionConfig

ROOT = Path(__file__).parents[2]
TORCHRUN = """#!{python}
import pathlib, signal, sys, time
def end(number, _):
    pathlib.Path("got").write_text(signal.Signals(number).name)
    sys.exit({ends})
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
pathlib.Path("new").write_text(" ".join(sys.argv[1:]))
pathlib.Path("new").rename("words")
time.sleep(30)
"""
SRUN = """#!/bin/bash
echo "$@" > srun
"${@:2}" &
task=$!
trap 'kill -USR1 "$task"' USR1
trap 'kill -KILL "$task"' TERM
code=0
wait "$task" || code=$?
while kill -0 "$task" 2>/dev/null; do wait "$task" && code=0 || code=$?; done
exit "$code"
"""
"""Hands signals on; where it gets SIGTERM itself it kills its tasks ("forcing job termination"), as the real one."""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def place(tmp_path: Path):
    """A folder with the launch scripts, and programs that only look like the real ones."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")

    def made(ends: int = 1, dry_run: int = 0) -> Path:
        texts = {
            "rlpt": f"#!/bin/bash\nexit {dry_run}\n",
            "torchrun": TORCHRUN.format(python=sys.executable, ends=ends),
            "srun": SRUN,
            "scontrol": SCONTROL,
        }
        (tmp_path / ".venv/bin").mkdir(parents=True)
        for name, text in texts.items():
            (tmp_path / ".venv/bin" / name).write_text(text)
            (tmp_path / ".venv/bin" / name).chmod(0o755)
        return tmp_path

    return made


def ended(place: Path, script: str, *numbers: signal.Signals, hangup: str = "default") -> int:
    """The exit code of a script that gets signals once torchrun is there."""
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "4711"}
    job = slurm if script.endswith("sbatch") else {}
    path = os.pathsep.join([str(place / ".venv/bin"), os.environ["PATH"]])
    # A shell traps no signal that is ignored where it starts: so it is in what another shell runs in the background.
    process = subprocess.Popen(
        [
            "env",
            "--default-signal=INT",
            f"--{hangup}-signal=HUP",
            "bash",
            script,
            "run.toml",
            "--set",
            "seed=1",
        ],
        cwd=place,
        env=os.environ | job | {"PATH": path},
    )
    deadline = time.monotonic() + 20
    while numbers and not (place / "words").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in numbers:
        process.send_signal(number)
    return process.wait(timeout=20)


@pytest.mark.parametrize(
    ("number", "forwarded", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGUSR1, "SIGTERM", 143),
        (signal.SIGHUP, "SIGTERM", 143),
        (signal.SIGINT, "SIGINT", 130),
    ],
    ids=["TERM", "USR1", "HUP", "INT"],
)
def test_train_hands_a_signal_on_and_exits_with_its_code(
    place, number: signal.Signals, forwarded: str, code: int
) -> None:
    folder = place()
    assert ended(folder, "launch/train.sh", number) == code
    assert (folder / "got").read_text() == forwarded
    words = (folder / "words").read_text()
    assert words.startswith("--standalone --nproc-per-node ")
    assert words.endswith("-m rlpt.train run.toml --set seed=1")


def test_a_terminal_that_is_closed_ends_nothing_under_nohup(place) -> None:
    folder = place()
    code = ended(folder, "launch/train.sh", signal.SIGHUP, signal.SIGINT, hangup="ignore")
    assert (code, (folder / "got").read_text()) == (130, "SIGINT")
    assert "SIGTERM,SIGINT,SIGQUIT,SIGUSR1 -m rlpt.train" in (folder / "words").read_text()


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["USR1", "TERM"]
)
def test_a_job_that_is_asked_to_end_before_it_began_begins_nothing(
    place, number: signal.Signals, requeued: bool
) -> None:
    folder = place()
    # Its first call says that it is there, and takes its time.
    scontrol = folder / ".venv/bin/scontrol"
    scontrol.write_text(SCONTROL.replace("then printf", "then touch words; sleep 1; printf"))
    assert ended(folder, "launch/slurm.sbatch", number) == 143
    assert (folder / "requeued").exists() == requeued
    assert not (folder / "srun").exists()


def test_a_run_that_was_done_when_the_signal_came_has_succeeded(place) -> None:
    assert ended(place(ends=0), "launch/train.sh", signal.SIGTERM) == 0


def test_a_mistake_starts_no_rank_and_is_not_requeued(place) -> None:
    folder = place(dry_run=2)
    assert ended(folder, "launch/train.sh") == 2
    assert ended(folder, "launch/slurm.sbatch") == 2
    assert not (folder / "words").exists()
    assert not (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("number", "requeued"),
    [(signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, None)],
    ids=["its time is up", "cancelled"],
)
def test_a_job_goes_back_into_the_queue_where_its_time_is_up(
    place, number: signal.Signals, requeued: str | None
) -> None:
    folder = place()
    assert ended(folder, "launch/slurm.sbatch", number) == 143
    assert (folder / "got").read_text() == "SIGTERM"
    assert (folder / "srun").read_text().startswith("--kill-on-bad-exit launch/train.sh run.toml")
    words = (folder / "words").read_text()
    meet = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:29500 --rdzv-id 4711 "
    assert words.startswith(meet)
    found = (folder / "requeued").read_text() if (folder / "requeued").exists() else None
    assert found == requeued


def test_a_job_that_was_done_in_time_does_not_go_back(place) -> None:
    folder = place(ends=0)
    assert ended(folder, "launch/slurm.sbatch", signal.SIGUSR1) == 0
    assert not (folder / "requeued").exists()


def test_whoever_waits_waits_longer_than_what_it_waits_for() -> None:
    _, job = yaml.safe_load_all((ROOT / "launch/k8s.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (train,) = pod["containers"]
    (grace,) = [int(pair["value"]) for pair in train["env"] if pair["name"] == "GRACE"]
    assert "${GRACE:-90}" in (ROOT / "launch/train.sh").read_text()
    budget = SupervisionConfig().stop_seconds
    assert budget < grace == 90 < pod["terminationGracePeriodSeconds"]
    batch = (ROOT / "launch/slurm.sbatch").read_text()
    assert grace < int(batch.split("#SBATCH --signal=B:USR1@")[1].split()[0])


def test_a_pod_ends_for_good_with_a_mistake_and_goes_on_after_an_eviction() -> None:
    claim, job = yaml.safe_load_all((ROOT / "launch/k8s.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (train,) = pod["containers"]
    # A failure policy is refused with any other restart policy.
    assert pod["restartPolicy"] == "Never"
    mistake, evicted, signalled = spec["podFailurePolicy"]["rules"]
    codes = {"containerName": train["name"], "operator": "In"}
    assert mistake == {"action": "FailJob", "onExitCodes": codes | {"values": [2]}}
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert signalled == {"action": "Ignore", "onExitCodes": codes | {"values": [143]}}
    mounted = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert any(word.startswith(f"run_dir={mounted['runs']}/") for word in train["args"])
    assert [pair["name"] for pair in train["env"]] == ["GRACE"]
    assert train["envFrom"] == [{"secretRef": {"name": "rlpt-tokens", "optional": True}}]
