"""A run that is asked to end finishes the step in hand, saves and goes on from there; never later than its budget."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpt import checkpoint, dist, train
from rlpt.exits import INTERRUPTED, TERMINATED, StoppedError
from rlpt.preemption import stoppable
from rlpt.session import Session


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch, runs):
    """A run that gets a signal in the middle of a step; what it says."""

    def run(toml: Path, step: int, number: signal.Signals, code: int, *words: str) -> str:
        real = train.run_step

        def run_step(session, work, stage, progress):
            if progress.step + 1 == step:
                os.kill(os.getpid(), number)
            return real(session, work, stage, progress)

        with monkeypatch.context() as patched:
            patched.setattr(train, "run_step", run_step)
            return runs.finished(toml, *words, code=code)

    return run


@pytest.fixture
def goes_on(runs, signalled, toml: Path):
    """A run that is asked to end in a step, and what it comes to in the end, beside one that nobody asked."""

    def check(step: int, reference: Path, *words: str) -> None:
        said = signalled(toml, step, signal.SIGTERM, TERMINATED, *words)
        last = f"stopped at step {step} after SIGTERM; repeat the command to go on"
        assert said.splitlines()[-1] == last
        run_dir = toml.parent / "run"
        assert checkpoint.complete_steps(run_dir)[-1] == step
        assert f"at step {step}" in runs.finished(toml, *words)
        assert json.dumps(runs.steps_of(run_dir)) == json.dumps(runs.steps_of(reference))
        journal = (reference / "evaluations.jsonl").read_bytes()
        assert (run_dir / "evaluations.jsonl").read_bytes() == journal
        expected = runs.weights_of(reference, 20)
        for name, tensor in runs.weights_of(run_dir, 20).items():
            assert torch.equal(tensor, expected[name]), name

    return check


@pytest.mark.slow
def test_a_run_that_was_asked_to_end_goes_on_bit_for_bit(goes_on, whole: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    goes_on(13, whole, "--set", "checkpoint.every=2")
    assert handlers == [signal.getsignal(number) for number in numbers]


@pytest.fixture(scope="session")
def evaluated(runs, beside, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run with evaluations inside its stages. To be read alone."""
    toml = beside("conftest").write_run(tmp_path_factory.mktemp("evaluated"), shards_dir)
    runs.finished(toml, "--set", "evaluation.every=5")
    return toml.parent / "run"


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 9, 10, 11, 15, 20])
def test_no_evaluation_is_left_out_or_made_twice(goes_on, evaluated: Path, step: int) -> None:
    goes_on(step, evaluated, "--set", "evaluation.every=5")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, TERMINATED), (signal.SIGINT, INTERRUPTED)],
    ids=["SIGUSR1", "Ctrl-C"],
)
def test_every_signal_has_its_exit_code(
    request: pytest.FixtureRequest, signalled, toml: Path, number: signal.Signals, code: int
) -> None:
    said = signalled(toml, 1, number, code)
    assert f"stopped at step 1 after {request.node.callspec.id}" in said
    assert checkpoint.complete_steps(toml.parent / "run") == [1]


def test_before_the_first_step_it_ends_at_once_and_saves_nothing(
    runs, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.begin

    def begin(self, stage):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, stage)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "begin", begin)
        said = runs.finished(toml, code=TERMINATED)
    assert "stopped before there was anything new to save after SIGTERM" in said
    assert not (toml.parent / "run" / "checkpoints").exists()


def test_a_signal_while_the_ranks_ask_each_other_is_seen_the_next_time(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To this rank alone, after it has told the others that there was none."""
    largest = dist.largest

    def late(value: int, world: dist.World) -> int:
        found = largest(value, world)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with suppress(StoppedError), stoppable(60) as stop, stop.deferred():
        with monkeypatch.context() as patched:
            patched.setattr(dist, "largest", late)
            assert not train.asked(stop, world)
        assert train.asked(stop, world)


def test_what_nobody_looked_at_ends_the_run_where_signals_are_no_longer_put_off() -> None:
    def run() -> None:
        with stoppable(60) as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked == signal.SIGTERM

    with pytest.raises(StoppedError, match="stopped before the next stage after SIGTERM"):
        run()


def test_a_signal_during_a_failure_does_not_hide_it() -> None:
    def run() -> None:
        with stoppable(60) as stop:
            try:
                with stop.deferred():
                    raise ValueError("the cause")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ValueError, match="the cause"):
        run()


def test_a_second_signal_does_not_disturb_the_end() -> None:
    ended = []

    def run() -> None:
        with stoppable(60):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.append(True)

    with pytest.raises(StoppedError) as stopped:
        run()
    assert stopped.value.code == INTERRUPTED
    assert ended


def test_threads_other_than_the_main_one_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with stoppable(60) as stop, stop.deferred():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(60) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


PAUSED = """
import sys, time
from pathlib import Path
from rlpt import train
from rlpt.cli import main

real, here, gone = train.run_step, Path(sys.argv[2]), Path(sys.argv[3])

def run_step(session, work, stage, progress):
    if progress.step + 1 == 13:
        here.touch()
        while not gone.exists():
            time.sleep(0.01)
    return real(session, work, stage, progress)

train.run_step = run_step
main(["train", sys.argv[1]])
"""


@pytest.fixture
def left_alone(toml: Path, tmp_path: Path):
    """A run whose stderr nobody reads any more in step 13, and that then gets a signal; its exit code."""

    def run(ours: int, theirs: int, number: int = 0, **options: Any) -> int:
        here, gone = tmp_path / "here", tmp_path / "gone"
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PAUSED, str(toml), str(here), str(gone)],
            stdin=theirs if os.isatty(theirs) else None,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            **options,
        )
        os.close(theirs)
        while not here.exists():
            assert process.poll() is None
            # What nobody reads is full before long.
            if select.select([ours], [], [], 0.02)[0]:
                os.read(ours, 4096)
        os.close(ours)
        if number:
            process.send_signal(number)
        gone.touch()
        return process.wait(timeout=100)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hangup", "code", "step"),
    [(signal.SIG_DFL, TERMINATED, 13), (signal.SIG_IGN, 0, 20)],
    ids=["heeded", "ignored"],
)
def test_a_run_whose_terminal_is_gone_saves_and_goes_on(
    left_alone, runs, toml: Path, whole: Path, hangup: signal.Handlers, code: int, step: int
) -> None:
    def takes_the_terminal() -> None:
        signal.signal(signal.SIGHUP, hangup)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    # As under a shell: the kernel tells it when the terminal goes.
    ended = left_alone(*pty.openpty(), start_new_session=True, preexec_fn=takes_the_terminal)
    assert ended == code
    run_dir = toml.parent / "run"
    assert checkpoint.complete_steps(run_dir)[-1] == step
    assert f"at step {step}" in runs.finished(toml)
    assert json.dumps(runs.steps_of(run_dir)) == json.dumps(runs.steps_of(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGHUP, TERMINATED), (signal.SIGINT, INTERRUPTED), (0, 0)],
    ids=["SIGHUP", "Ctrl-C", "no signal"],
)
def test_the_end_of_who_reads_along_is_not_that_of_the_run(
    left_alone, toml: Path, number: int, code: int
) -> None:
    """`rlpt train ... 2>&1 | tee log`: both get the Ctrl-C."""

    def heeds_hangups() -> None:
        # The tests themselves may run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    assert left_alone(*os.pipe(), number, preexec_fn=heeds_hangups) == code
    last = checkpoint.complete_steps(toml.parent / "run")[-1]
    assert last == (13 if number else 20)


STUCK = """
import ctypes
from rlpt.phases import CLOCK, phase
from rlpt.preemption import stoppable

with stoppable({seconds}) as stop, stop.deferred(), phase("evaluate"):
    CLOCK.step = 7
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    print("ready", flush=True)
    # Locked twice: native code that no handler of Python interrupts.
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


def stuck(seconds: float) -> subprocess.Popen[str]:
    """A process in native code for ever, that signals are to end within ``seconds``."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_native_code_is_cut_off_when_the_budget_is_spent() -> None:
    process = stuck(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert 0.3 <= time.monotonic() - began < 3
    assert process.returncode == TERMINATED
    assert said.splitlines()[-1] == (
        "cut off in phase evaluate after step 7, 0.3 s (supervision.stop_seconds) after SIGTERM; the last checkpoint "
        "is kept: repeat the command to go on from it"
    )


def test_a_second_interrupt_ends_at_once_and_an_echo_of_the_first_does_not() -> None:
    process = stuck(60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == INTERRUPTED
    assert said.splitlines()[-1] == "interrupted twice: the last checkpoint is kept"
