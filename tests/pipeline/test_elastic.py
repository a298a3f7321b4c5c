"""A run goes on with any number of ranks: the same documents, cuts and thoughts once each, and the same losses."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlpt.prompts import Stream

SCRIPT = Path(__file__).with_name("elastic_leg.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
EXACT = {"stage", "step", "tokens/train", "update/one_forward"}


def leg(toml: Path, ranks: int, step: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, str(SCRIPT), str(step), str(toml), "checkpoint.every=1"]
    ended = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, timeout=280)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "legs",
    [((1, 5), (2, 12), (4, 15), (1, 0)), ((2, 13), (1, 0)), ((4, 6), (2, 0))],
    ids=["1-2-4-1", "2-1", "4-2"],
)
def test_a_run_that_changes_its_number_of_ranks_is_the_one_that_does_not(
    runs, whole: Path, toml: Path, legs: tuple[tuple[int, int], ...]
) -> None:
    """Thoughts exactly, losses and weights to 1e-5: in both stages, across the one between them."""
    for ranks, step in legs:
        leg(toml, ranks, step)
    changed = toml.parent / "run"
    assert runs.thoughts_of(changed) == runs.thoughts_of(whole)
    mine, theirs = runs.steps_of(changed), runs.steps_of(whole)
    assert [row["step"] for row in mine] == list(range(1, 21))
    for row, known in zip(mine, theirs, strict=True):
        assert row["loss/next_token"] == pytest.approx(known["loss/next_token"], rel=1e-5)
        for name in known.keys() - EXACT:
            # Log-ratios and gains are differences of fp32 log-probabilities: their noise is absolute.
            assert row[name] == pytest.approx(known[name], rel=1e-5, abs=2e-6), (row["step"], name)
    expected = runs.weights_of(whole, 20)
    for name, tensor in runs.weights_of(changed, 20).items():
        apart = torch.linalg.vector_norm(tensor - expected[name])
        assert apart <= 1e-5 * torch.linalg.vector_norm(expected[name]), name


@pytest.mark.parametrize("table", [{}, {"max_staleness": 3}, {"max_staleness": 3, "max_reuse": 2}])
def test_what_waits_and_what_is_kept_is_trained_once_a_use_over_every_change(
    paced, stream: Stream, on_ranks, table: dict[str, int]
) -> None:
    """1 -> 2 -> 4 -> 1 ranks, an engine that samples ahead."""
    cfg, stage = paced.config(**table), paced.stage_of(8, 24)
    rows, cursor, past = [], 0, []
    for ranks, start, stop in ((1, 0, 5), (2, 5, 11), (4, 11, 16), (1, 16, 24)):

        def body(world, start=start, stop=stop, rows=rows, cursor=cursor):
            run = paced.Run(stream, cfg, stage, world, world.rank, 3)
            run.engine.version = start
            run.supply.restore(rows, cursor, "test")
            return run.go(start, stop)

        found = on_ranks(ranks, body)
        rows, cursor = [row for run in found for row in run.rows()], found[0].supply.next
        past += found
    uses = Counter(
        position for run in past for batch in run.trained for position in batch.positions
    )
    first = [position for run in past for position in run.first]
    waiting = [row["position"] for row in rows if row["place"] == "waiting"]
    assert sorted(first + waiting) == list(range(cursor))
    # A rank that got fewer has dispatched one more, and so have the others of four.
    assert len(waiting) <= 3
    assert max(uses.values()) == cfg.max_reuse
    assert sum(uses.values()) == 24 * stage.documents_per_step
