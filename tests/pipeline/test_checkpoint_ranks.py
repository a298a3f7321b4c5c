"""Two ranks that train and save beside it: what fails on one is the end of both, at one step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlpt import checkpoint


@pytest.mark.slow
def test_what_fails_on_one_rank_is_raised_on_all_at_one_step_while_they_train(
    tmp_path: Path,
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(Path(__file__).with_name("saving_ranks.py"))]
    ended = subprocess.run([*command, str(tmp_path)], capture_output=True, timeout=100)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{n}.json").read_text()) for n in (0, 1))
    ((steps, at, said),) = first["raised"]
    assert second["raised"] == [[steps, at, said]]
    assert at == 2
    assert "rank 1: " in said
    assert "supply_1: the checkpoint could not be written: No space left" in said
    # Training went on meanwhile, in step.
    assert first["steps"] == second["steps"] > 6
    assert first["saved"] == second["saved"] == [1, 3]
    files = {path.name for path in checkpoint.path_of(tmp_path, 3).iterdir()}
    assert files >= {"supply_0", "supply_1", "__0_0.distcp", "progress.json"}
