"""Publications of several ranks: every engine ends with the whole policy, or all ranks say why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("publish_on_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks found; the policy is sharded over both, and each has an engine."""
    out = tmp_path_factory.mktemp("ranks")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(SCRIPT), str(out)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["directory", "broadcast"])
def test_engines_of_all_ranks_get_the_whole_of_a_sharded_policy(ranks, way: str) -> None:
    for rank in ranks:
        assert rank[way]["shards"] == "half of it"
        assert rank[way]["versions"] == [1, 2]
        assert rank[way]["differ"] == []
        assert rank[way]["messages_agree"]
        assert rank[way]["loads"] == ["load 1", "load 2"]


@pytest.mark.slow
def test_an_engine_of_the_second_rank_comes_back_during_a_step(ranks) -> None:
    assert [rank["revived"]["restarts"] for rank in ranks] == [0, 1]
    assert all(rank["revived"]["differ"] == [] for rank in ranks)


@pytest.mark.slow
def test_an_engine_of_the_second_rank_that_dies_within_a_broadcast_stops_no_rank(ranks) -> None:
    assert [rank["died"]["restarts"] for rank in ranks] == [0, 2]
    assert all(rank["died"]["differ"] == [] for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["damaged", "full_disk"])
def test_what_fails_on_one_rank_fails_on_both_and_names_it(ranks, case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert first == second
    wanted = {
        "damaged": "rank 1: engine http://",
        "full_disk": "rank 0: OSError: full",
    }
    assert first.startswith(wanted[case])
    assert case != "damaged" or "tensor 1.weight has checksum" in first
