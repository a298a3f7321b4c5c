"""The shared layout in processes of its own: two ranks, compiled blocks."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlpt import dist

SCRIPT = Path(__file__).with_name("shared_gradients.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def alone(world: dist.World) -> dict[str, dict[str, torch.Tensor]]:
    """On one rank, eagerly; held against one sequence at a time by test_branches.py."""
    return runpy.run_path(str(SCRIPT))["gradients"](world)


def elsewhere(folder: Path, *words: str, ranks: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    out = folder / "gradients.pt"
    command = [sys.executable, *launcher, str(SCRIPT), str(out), *words]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for batch, known in expected.items():
        assert found[batch].keys() == known.keys()
        assert all(grad.norm() > 1e-3 for grad in known.values())
        for name, grad in known.items():
            error = torch.linalg.vector_norm(found[batch][name] - grad)
            assert error <= 1e-5 * grad.norm(), (batch, name, float(error / grad.norm()))


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(alone, tmp_path: Path) -> None:
    """Issue: 1e-5 relative; also where one rank has no document."""
    assert_same(elsewhere(tmp_path, ranks=2), alone)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_gradients_of_eager_ones(alone, tmp_path: Path) -> None:
    assert_same(elsewhere(tmp_path, "compile"), alone)
