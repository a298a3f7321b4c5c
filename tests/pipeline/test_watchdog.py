"""A run that hangs ends by itself, and says which rank in which phase."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import HashStore

from rlpt import dist
from rlpt.phases import Clock
from rlpt.policy.scoring import Scorer
from rlpt.watchdog import Standing, told, verdict, watched

HANGING = Path(__file__).with_name("hanging_rank.py")


def standing(
    rank: int, entered: int, idle: float = 5.0, phase: str = "generate", answers: bool = True
) -> Standing:
    return Standing(rank, phase, 7, entered, idle, answers, "here", 100 + rank)


@pytest.mark.parametrize(
    ("standings", "said"),
    [
        pytest.param(
            [standing(0, 41)],
            "rank 0 did not go on for 5 s in phase generate of step 7 (",
            id="alone",
        ),
        pytest.param(
            [standing(0, 41, phase="score"), standing(1, 40, 6.0), standing(2, 41, 9.0, "score")],
            "rank 1 did not go on for 6 s in phase generate of step 7; waiting in phase score of step 7: rank 0, 2 (",
            id="the one that came least far",
        ),
        pytest.param(
            [standing(0, 41), standing(1, 41, 8.0), standing(2, 42, phase="update")],
            "rank 0, 1 did not go on for 8 s in phase generate of step 7; waiting in phase update of step 7: rank 2 (",
            id="two that came least far",
        ),
        pytest.param(
            [standing(0, 43, phase="update"), standing(1, 41, 0.1, answers=False)],
            "rank 1, last heard of in phase generate of step 7, is silent for 4 s or longer; waiting in phase "
            "update of step 7: rank 0 (",
            id="one that does not answer",
        ),
        pytest.param(
            [standing(0, 41), standing(1, 41, 0.1, answers=False)],
            "rank 1, last heard of in phase generate of step 7, is silent for 4 s or longer (",
            id="of two the one that does not answer",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(standings: list[Standing], said: str) -> None:
    assert verdict(standings, 4.0).startswith(said)


def test_work_of_one_rank_alone_does_not_set_it_before_the_others() -> None:
    clock = Clock()
    clock.enter()
    before = clock.since
    clock.beat()
    assert clock.entered == 1
    assert clock.since > before


def test_every_batch_is_a_sign_of_life(
    plan, policy, world, stream, paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(Clock, "beat", lambda _clock: beats.append(1))
    trunks = [stream.trunk(n, paced.CFG, paced.SEED) for n in range(6)]
    longest = max(len(trunk.ids) for trunk in trunks)
    scorer = Scorer(policy, plan.vocabulary.markers.ids, world, longest)
    scorer.trunks([(trunk, 1, len(trunk.ids)) for trunk in trunks])
    assert len(beats) >= sum(len(trunk.ids) for trunk in trunks) / longest


def test_a_process_can_be_ended_by_the_others_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HashStore()
    monkeypatch.setattr(dist, "own_store", lambda _world: store)
    with watched(1000.0, tmp_path, dist.World(1, 2, torch.device("cpu"))):
        # A key that is not there yet would be waited for.
        assert store.check(["1"])
        mine = Standing(**json.loads(store.get("1")))
    assert (mine.rank, mine.pid, mine.answers) == (1, os.getpid(), False)


def test_every_rank_is_asked_whether_or_not_all_have_told() -> None:
    store, (first, second) = HashStore(), (standing(0, 3), standing(1, 4))
    store.set("0", json.dumps(asdict(first)))
    assert told(store, 2) == [first, Standing(1)]
    store.set("1", json.dumps(asdict(second)))
    assert told(store, 2) == [first, second]


ALONE = """
import sys, time
from pathlib import Path
import torch
from rlpt.dist import World
from rlpt.phases import phase
from rlpt.watchdog import watched

def sleeps_for_ever():
    time.sleep(1000)

with watched(0.6, Path(sys.argv[1]), World(0, 1, torch.device("cpu"))), phase("publish"):
    now = time.time
    # Clocks on the wall are put forward and back; nobody is to be late by them.
    time.time = lambda: now() + 1e6
    time.sleep(0.4)
    time.time = lambda: now() - 1e6
    sleeps_for_ever()
"""


def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(
        f"{tmp_path}: rank 0 did not go on for 1 s in phase publish of step 1 (supervision.hang_seconds = 0.6); "
    )
    stacks = (tmp_path / "stacks_rank0.txt").read_text()
    assert "in sleeps_for_ever" in stacks
    assert "in sleeps_for_ever" in ended.stderr


def hung(toml: Path, how: str, ranks: int, seconds: float) -> tuple[str, float, int]:
    """What a run says of which the last rank hangs in step 12, its seconds from then on, its exit code."""
    hang = {"rank": ranks - 1, "step": 12, "how": how}
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone"]
    launcher += [] if ranks == 1 else ["--shutdown-timeout", "5", "--nproc-per-node", str(ranks)]
    words = ["--set", f"supervision.hang_seconds={seconds}"]
    process = subprocess.Popen(
        [sys.executable, *launcher, str(HANGING), str(toml), *words],
        env=os.environ | {"HANG": json.dumps(hang), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    metrics = toml.parent / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") == 11):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    began = time.monotonic()
    family = psutil.Process(process.pid).children(recursive=True)
    said = process.communicate(timeout=100)[1].decode()
    took = time.monotonic() - began
    _, alive = psutil.wait_procs(family, timeout=2)
    assert not alive
    return said, took, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["sleep", "stop", "native"])
def test_a_hanging_rank_is_named_and_nothing_is_left_of_the_run(
    runs, toml: Path, how: str, ranks: int
) -> None:
    if (how, ranks) == ("stop", 1):
        pytest.skip("nobody is there to name it")
    said, took, code = hung(toml, how, ranks, 4.0)
    assert code == 1
    assert took < 4 + 12
    run_dir = toml.parent / "run"
    if how == "native" and ranks == 1:
        assert "Timeout (0:00:" in said
        assert "in never_returns" in said
    else:
        (line,) = [each for each in said.splitlines() if "supervision.hang_seconds = 4" in each]
        rank = "" if ranks == 1 else r"\[rank 0\] "
        waits = "" if ranks == 1 else r"; waiting in phase \w+ of step 12: rank 0"
        found = (
            rf"rank {ranks - 1} did not go on for \d s in phase generate of step 12"
            if how == "sleep"
            # What was heard last is older than its end by up to one look, and steps are short.
            else r"rank 1, last heard of in phase \w+ of step (?:[1-9]|1[0-2]), is silent for 4 s or longer"
        )
        assert re.match(rf"{rank}{run_dir}: {found}{waits} \(", line), line
    if how == "sleep":
        assert "in sleeps_for_ever" in (run_dir / f"stacks_rank{ranks - 1}.txt").read_text()
    runs.finished(toml)
