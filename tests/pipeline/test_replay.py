"""`rlpt replay`: a saved step computed again comes to the numbers that the run wrote down."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlpt import checkpoint
from rlpt.cli import cli, main


@pytest.fixture(scope="module")
def with_groups(runs, beside, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that kept its groups and a checkpoint of every second step. To be read alone."""
    toml = beside("conftest").write_run(tmp_path_factory.mktemp("groups"), shards_dir)
    words = ("rollout.save_groups=true", "checkpoint.every=2", "checkpoint.keep_last=9")
    runs.finished(toml, *(word for each in words for word in ("--set", each)))
    return toml.parent / "run"


def replayed(run_dir: Path, step: int) -> dict[str, dict[str, float]]:
    done = CliRunner().invoke(cli, ["replay", str(run_dir), "--step", str(step), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", [11, 15])
def test_a_step_computed_again_comes_to_the_same_numbers(with_groups: Path, step: int) -> None:
    found = replayed(with_groups, step)
    # Losses, gradient norm and rewards among them, not clocks alone.
    assert {"loss/policy", "loss/grad_norm", "reward/mean"} <= set(found)
    for name, pair in found.items():
        assert pair["run"] == pair["replay"], name


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path, step: int) -> str:
    with pytest.raises(SystemExit) as left:
        main(["replay", str(run_dir), "--step", str(step)])
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_checkpoint_is_not_replayed(
    with_groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(with_groups, run_dir)
    path = checkpoint.path_of(run_dir, 14)
    tensors = bytearray((path / "__0_0.distcp").read_bytes())
    # In the middle of the numbers, where it reads as another one.
    tensors[len(tensors) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(tensors)
    said = refused(capsys, run_dir, 15)
    assert said.startswith(f"{path}: __0_0.distcp has blake2b ")
    assert said.endswith("restore it, or name another step")


@pytest.mark.parametrize(
    ("step", "says"),
    [
        pytest.param(5, "step 5 is of stage warmup, which has no groups", id="no rollouts"),
        pytest.param(12, "step_000011: no such checkpoint", id="no checkpoint"),
        pytest.param(21, "step 20 was its last; replay an earlier one", id="behind the end"),
    ],
)
def test_a_step_that_cannot_be_computed_again_is_said(
    with_groups: Path, capsys: pytest.CaptureFixture[str], step: int, says: str
) -> None:
    assert says in refused(capsys, with_groups, step)
