"""Engine processes that a trainer starts: they say where they are, and none is left behind, however the trainer ends.

The processes are real; in place of vLLM they load `fake_backend.py`, by a `sitecustomize` on their path.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlpt.rollout.client import EngineClient, EngineDownError
from rlpt.rollout.process import EngineProcess
from rlpt_data.strict import UserError

HERE = Path(__file__).parent
PARENT = HERE / "engine_parent.py"
FAKE_VLLM = f'''
import os, sys, time, types

class Lazy(types.ModuleType):
    """Stands for rlpt.rollout.vllm_engine."""

    def __getattr__(self, name):
        if name == "check_model":
            return check
        if name != "VLLMBackend":
            raise AttributeError(name)
        return make

def check(spec):
    from rlpt_data.strict import UserError

    if spec.architecture == "refused":
        raise UserError("policy: nobody runs this; take another")

def make(spec):
    print("libraries print to stdout")
    if spec.architecture == "faulty":
        raise ZeroDivisionError("no luck")
    if spec.architecture == "killed":
        os.kill(os.getpid(), 9)
    if spec.architecture == "slow":
        time.sleep(60)
    import importlib.util

    found = importlib.util.spec_from_file_location("fake_backend", {str(HERE / "fake_backend.py")!r})
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.FakeBackend(spec)

sys.modules["rlpt.rollout.vllm_engine"] = Lazy("rlpt.rollout.vllm_engine")
'''


@pytest.fixture(autouse=True)
def _without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every process that a test starts."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(FAKE_VLLM)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{before}".rstrip(os.pathsep))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def engine(fake, tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    made: list[EngineProcess] = []

    def process(start_seconds: float = 60.0, **changes) -> EngineProcess:
        spec = fake.specification(**changes)
        log = tmp_path / "engine" / f"{len(made)}.log"
        made.append(EngineProcess(spec, log, fake.TOKEN, 1, None, start_seconds))
        made[-1].start()
        return made[-1]

    yield process
    for each in made:
        each.kill()


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether the process ends, zombies counted as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


# ---- the end of a trainer ----------------------------------------------------------------------------

ENDINGS = {
    "killed": ("wait", signal.SIGKILL),
    "killed, its stdin held": ("hold", signal.SIGKILL),
    "interrupted": ("wait", signal.SIGINT),
    "returned": ("return", None),
}


@pytest.fixture
def parents(fake, tmp_path: Path) -> Iterator[dict[str, tuple[subprocess.Popen, int]]]:
    """A trainer for every ending, and the process id of its engine; all start side by side."""
    started: dict[str, subprocess.Popen] = {}
    for name, (how, _) in ENDINGS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "spec.json").write_text(fake.specification().model_dump_json())
        started[name] = subprocess.Popen(
            [sys.executable, str(PARENT), str(folder), how],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            # A shell starts what it puts in the background with Ctrl-C ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    engines: dict[str, dict] = {}
    try:
        for name, process in started.items():
            assert process.stdout
            line = process.stdout.readline()
            assert line, process.communicate()[1].decode()[-2000:]
            engines[name] = json.loads(line)
        yield {name: (process, engines[name]["pid"]) for name, process in started.items()}
    finally:
        for name, process in started.items():
            process.kill()
            if (holder := engines.get(name, {}).get("holder")) is not None:
                os.kill(holder, signal.SIGKILL)
            process.communicate()


def test_no_engine_outlives_its_trainer_however_that_ends(parents) -> None:
    for name in (name for name, (_, ending) in ENDINGS.items() if ending is not None):
        process, engine = parents[name]
        assert process.poll() is None
        assert psutil.pid_exists(engine)
        ending = ENDINGS[name][1]
        # Ctrl-C in a terminal goes to the whole group, of which the engine is none; a kill to one process.
        (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending)
    for name, (process, engine) in parents.items():
        process.wait(timeout=20)
        assert gone(engine), f"{name}: engine {engine} is left"
    codes = {name: process.returncode for name, (process, _) in parents.items()}
    assert codes["killed"] == -signal.SIGKILL
    assert codes["returned"] == 0


# ---- one engine --------------------------------------------------------------------------------------


def test_an_engine_says_its_address_and_serves_until_it_is_stopped(engine, fake, tmp_path) -> None:
    process = engine()
    assert process.alive
    process.wait()
    client = EngineClient(process.address, fake.TOKEN, "a", 5.0)
    assert client.describe() == (process.spec, -1)
    assert psutil.Process(process.pid).environ()["TMPDIR"] == str(process.log.with_suffix(""))
    # The token is in no argument, and the log has what libraries print.
    assert fake.TOKEN not in " ".join(psutil.Process(process.pid).cmdline())
    assert "libraries print to stdout" in process.log.read_text()
    pid, started = process.pid, time.monotonic()
    process.stop()
    assert time.monotonic() - started < 5.0
    assert gone(pid, 0.1)
    assert (process.alive, process.pid) == (False, None)
    with pytest.raises(EngineDownError):
        client.describe()
    client.close()
    process.stop()
    process.kill()


@pytest.mark.slow
def test_a_killed_engine_starts_again_and_ends_with_its_stdin(engine, fake) -> None:
    process = engine()
    process.wait()
    first = process.pid
    os.kill(first, signal.SIGKILL)
    process._process.wait(5)
    assert not process.alive
    process.kill()
    process.start()
    process.wait()
    assert (process.starts, process.alive) == (2, True)
    assert process.pid != first
    client = EngineClient(process.address, fake.TOKEN, "a", 5.0)
    assert client.describe()[1] == -1
    client.close()
    process._process.stdin.close()
    assert process._process.wait(5) == 0


@pytest.mark.slow
def test_engines_that_do_not_start_say_why_and_where_the_log_is(engine) -> None:
    faulty, killed, refused = (
        engine(architecture=name) for name in ("faulty", "killed", "refused")
    )
    with pytest.raises(EngineDownError) as error:
        faulty.wait()
    assert str(error.value) == (
        f"engine did not start: ZeroDivisionError: no luck; its log is {faulty.log}"
    )
    assert "Traceback" in faulty.log.read_text()
    with pytest.raises(EngineDownError, match=rf"exit code -9; its log is {killed.log}"):
        killed.wait()
    with pytest.raises(UserError) as mistake:
        refused.wait()
    assert str(mistake.value) == "policy: nobody runs this; take another"


def test_an_engine_that_takes_too_long_is_ended(engine) -> None:
    process = engine(start_seconds=0.5, architecture="slow")
    pid, started = process.pid, time.monotonic()
    with pytest.raises(
        EngineDownError,
        match=rf"within 0.5 s \(engine.vllm.start_seconds\); its log is {process.log}",
    ):
        process.wait()
    assert time.monotonic() - started < 3.0
    assert gone(pid, 0.5)


def test_an_engine_takes_no_part_in_the_trainers_process_group(
    fake, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    log = tmp_path / "engine.log"
    given = EngineProcess(fake.specification(), log, "secret", 3, "GPU-7")._environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} & given.keys()
    assert not [name for name in given if "TORCHELASTIC" in name]
    assert given["RLPT_ENGINE_TOKEN"] == "secret"
    assert (given["OMP_NUM_THREADS"], given["CUDA_VISIBLE_DEVICES"]) == ("3", "GPU-7")
