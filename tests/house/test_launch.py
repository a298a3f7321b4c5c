"""The launch scripts answer a mistake before they start a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"), [([], "no config given"), (["configs/train/no_such.toml"], "no such file")]
)
def test_a_mistake_is_one_line_and_exit_2(words: list[str], said: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        ["bash", "launch/train.sh", *words],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script", ["launch/train.sh", "launch/slurm.sbatch", "launch/prepare.sbatch", ".ci/run"]
)
def test_a_script_is_valid_shell(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
