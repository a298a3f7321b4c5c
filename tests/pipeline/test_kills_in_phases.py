"""The fault suite, shortened: processes that are killed in a phase go on as if nothing had happened."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

FAULTS = Path(__file__).parents[2] / "launch/faults"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of launch/faults, which import each other by name."""
    monkeypatch.syspath_prepend(FAULTS)
    # Processes that are forked have the environment that their server started with.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setitem(os.environ, name, "1")
    monkeypatch.setitem(os.environ, "PYTHONWARNINGS", "ignore")
    import evidence
    import kills
    import training

    return SimpleNamespace(evidence=evidence, kills=kills, training=training)


def trial_of(faults: SimpleNamespace, tmp_path: Path, shards_dir: Path, seed: int):
    """The suite's run on made shards."""
    return faults.training.TrainingTrial(
        "one rank", tmp_path, seed, shards_dir, settings=("evaluation.split=train",)
    )


def test_three_kills_change_nothing(faults: SimpleNamespace, tmp_path: Path, shards_dir: Path):
    row = trial_of(faults, tmp_path, shards_dir, 1).run(3, lambda *_: None).row()
    assert (row["kills"], row["resumed_equal"]) == (3, 3), row
    assert not faults.kills.failed([row]), row


def test_the_suite_sees_what_differs(faults: SimpleNamespace, tmp_path: Path, whole: Path) -> None:
    seen = faults.evidence.evidence
    left = faults.evidence.Evidence([], [], {}, [[0, 1], [2, 4], [4, 5]], "")
    assert faults.evidence.doubled_or_lost(left.positions) == (1, 1)
    found = seen(whole, 20)
    assert faults.evidence.differences(found, found) == []
    row = found.metrics[-1]
    other = found._replace(metrics=[*found.metrics[:-1], row | {"loss/policy": 1.0}], weights="")
    assert faults.evidence.differences(found, other) == ["metrics", "weights"]
    assert faults.evidence.far(found, found, 1e-5) == []
    (said,) = faults.evidence.far(found, other, 1e-5)
    assert said == f"loss/policy of step 20: {row['loss/policy']} and 1.0"
    assert faults.evidence.far(found, found._replace(positions=[[9]]), 1e-5) == ["positions"]
