"""datatrove's executors run the same jobs to the same bytes, and a killed task loses nothing."""

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from misbehaving import behave_unit

from rlpt_data.executors import LocalTasks, RayTasks, SlurmTasks, outcomes
from rlpt_data.manifest import digest
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.spool import Spool, work_off
from rlpt_data.strict import UserError
from rlpt_data.work import Done
from rlpt_data.workers import Failure

QUICK: dict[str, Any] = {"tasks": 2, "poll_seconds": 0.05, "settle_seconds": 0.0}
SLURM: dict[str, Any] = QUICK | {"kind": "slurm", "partition": "cpu", "time": "01:00:00"}


@dataclass(frozen=True)
class Job:
    unit: str
    path: str


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of twelve pages each."""
    folder = tmp_path_factory.mktemp("executors") / "pages"
    folder.mkdir()
    for file in range(3):
        texts = [f"Page {file} {n}. " + f"Some words stand here {n}. " * 8 for n in range(12)]
        lines = [json.dumps({"text": text, "url": f"https://s{file}.org/"}) for text in texts]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def prepared(pages: Path) -> Callable[..., dict[str, str]]:
    """Hashes of what a preparation with some executor writes."""

    def run(name: str, executor: dict[str, Any] | None = None) -> dict[str, str]:
        table = {
            "out": str(pages.parent / name),
            "without_decontamination": True,
            "source": {"kind": "jsonl", "path": str(pages)},
            "tokenizer": {"kind": "byte"},
            "split": {"dev": 0.2, "test": 0.2},
            "num_shards": 1,
        } | ({"executor": executor} if executor else {})
        config = PrepareConfig.model_validate_json(json.dumps(table))
        prepare(config, progress=False)
        files = sorted(path for path in config.out.rglob("*") if path.is_file())
        return {str(p.relative_to(config.out)): digest(p.read_bytes()) for p in files}

    return run


SBATCH = """
import os, re, subprocess, sys
arguments, script = sys.argv[1:-1], open(sys.argv[-1]).read()
option = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.M))
first, last = re.match(r"(\\d+)-(\\d+)", option["array"]).groups()
export = next(a for a in arguments if a.startswith("--export=ALL,"))
extra = dict(pair.split("=") for pair in export.removeprefix("--export=ALL,").split(","))
open(f"{STATE}/calls", "a").write(f"sbatch {option['partition']} {option['array']}\\n")
pids = []
for rank in range(int(first), int(last) + 1):
    environment = {**os.environ, **extra, "SLURM_ARRAY_TASK_ID": str(rank), "SLURM_NODELIST": "n1"}
    log = open(option["output"].replace("%A", "7").replace("%a", str(rank)), "w")
    task = subprocess.Popen(["bash", "-c", script], env=environment, stdout=log, stderr=log,
                            start_new_session=True)
    pids.append(task.pid)
open(f"{STATE}/{option['job-name']}", "w").write(" ".join(map(str, pids)))
print("Submitted batch job 7")
"""
SQUEUE = """
import sys
name = next(a for a in sys.argv if a.startswith("--name=")).removeprefix("--name=")
def running(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
try:
    pids = open(f"{STATE}/{name}").read().split()
except OSError:
    pids = []
for pid in filter(running, pids):
    print("7_0")
"""
SCANCEL = """
import os, signal, sys
name = sys.argv[1].removeprefix("--name=")
open(f"{STATE}/calls", "a").write("scancel\\n")
try:
    pids = open(f"{STATE}/{name}").read().split()
except OSError:
    pids = []
for pid in pids:
    try:
        os.killpg(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
SRUN = "import os, sys\nos.execvp(sys.argv[4], sys.argv[4:])  # srun -l -n 1 COMMAND\n"
SCONTROL = "print('n1')\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which run what they are given as processes of this machine."""
    programs = {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}
    for name, text in (programs | {"srun": SRUN, "scontrol": SCONTROL}).items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nSTATE = {str(tmp_path)!r}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    return tmp_path


@pytest.mark.slow
def test_local_tasks_write_the_bytes_of_our_own_workers(
    prepared: Callable[..., dict[str, str]],
) -> None:
    assert prepared("local", QUICK | {"kind": "local"}) == prepared("workers")


@pytest.mark.slow
def test_slurm_tasks_write_the_bytes_of_our_own_workers(
    prepared: Callable[..., dict[str, str]], cluster: Path
) -> None:
    assert prepared("slurm", SLURM | {"at_once": 1}) == prepared("workers again")
    calls = (cluster / "calls").read_text().splitlines()
    # Three files to read on two tasks; one shard for each of the three sides.
    assert [call for call in calls if call.startswith("sbatch")] == ["sbatch cpu 0-1%1"] * 2


def test_ray_tasks_write_the_bytes_of_our_own_workers(
    prepared: Callable[..., dict[str, str]],
) -> None:
    pytest.importorskip("ray")
    executor = QUICK | {"kind": "ray", "mem_per_cpu_gb": 0.1}
    assert prepared("ray", executor) == prepared("workers for ray")


@pytest.mark.parametrize("kind", [pytest.param("local", marks=pytest.mark.slow), "slurm"])
def test_a_killed_task_is_launched_again_and_a_job_that_kills_twice_is_a_failure(
    kind: str, cluster: Path
) -> None:
    executor = LocalTasks(kind="local", **QUICK) if kind == "local" else SlurmTasks(**SLURM)
    units = ["a", "die once", "b", "die", "raise", "c"]
    jobs = [Job(unit, str(cluster / unit)) for unit in units]
    found = {j.unit: r for j, r in outcomes(behave_unit, jobs, executor, 1, cluster / "spool")}
    texts = {unit: found[unit] for unit in ("a", "die once", "b", "c")}
    assert texts == {"a": "A", "die once": "DIE ONCE", "b": "B", "c": "C"}
    for unit, error in (("die", "ended without a result, 2 times"), ("raise", "KeyError: 'raise'")):
        assert isinstance(found[unit], Failure)
        assert error in found[unit].error


def test_what_was_finished_while_nobody_waited_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    spool, files = Spool(tmp_path / "spool"), [tmp_path / unit for unit in "abc"]
    for file in files:
        file.write_text(file.name)
        spool.begin(file.name)
        spool.save(file.name, Done((file,)))
    spool.save("c", Failure("no luck", ""))
    files[1].write_text("changed since")
    jobs = [Job(file.name, str(file)) for file in files]
    found = list(outcomes(behave_unit, jobs, LocalTasks(kind="local", **QUICK), 1, spool.folder))
    assert {job.unit: result for job, result in found} == {
        "a": Done((files[0],)),
        "b": "B",
        "c": "C",
    }
    assert spool.arrived("abc") == []


def test_a_task_takes_every_so_manyth_job_of_the_round(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(behave_unit, [Job(unit, "") for unit in "abcdefg"])
    work_off(str(tmp_path), None, 1, 3)
    assert spool.arrived("abcdefg") == ["b", "e"]


def test_a_mistake_of_the_user_ends_the_pass_and_its_tasks(cluster: Path) -> None:
    jobs = [Job("mistake", ""), Job("a", "")]
    with pytest.raises(UserError, match="yours"):
        list(outcomes(behave_unit, jobs, SlurmTasks(**SLURM), 1, cluster / "spool"))
    # Once for a predecessor, once for itself.
    assert (cluster / "calls").read_text().count("scancel") == 2


def test_tasks_that_cannot_begin_are_said_to_be_so(cluster: Path) -> None:
    executor = SlurmTasks(**SLURM, env_command="exit 3")
    with pytest.raises(UserError, match="ended before they began a job; their logs are in"):
        list(outcomes(behave_unit, [Job("a", "")], executor, 1, cluster / "spool"))


def test_missing_means_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Callable[..., dict[str, str]]
) -> None:
    jobs = [Job("a", "")]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no command sbatch here; run it where jobs are submitted"):
        list(outcomes(behave_unit, jobs, SlurmTasks(**SLURM), 1, tmp_path / "spool"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package ray is missing; pip install ray"):
        list(outcomes(behave_unit, jobs, RayTasks(kind="ray", **QUICK), 1, tmp_path / "spool"))


def test_workers_of_another_executor_are_refused(configured: Callable[..., PrepareConfig]) -> None:
    config = configured(
        'workers = 2\n[source]\nkind = "jsonl"\npath = "none.jsonl"\n'
        '[executor]\nkind = "local"\ntasks = 2\n'
    )
    with pytest.raises(UserError, match=r"workers = 2: these are for .*; set executor\.tasks"):
        prepare(config)
