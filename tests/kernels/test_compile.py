"""`torch.compile` around the operators: one graph, the same numbers, the same refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled_calls.py")


def calls(backend):
    done = subprocess.run(
        [sys.executable, SCRIPT, backend], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def traced():
    return calls("aot_eager")


CASES = (
    "logprob auto", "logprob slabs", "logprob chunked", "logprob triton", "logprob reference",
    "policy auto", "policy slabs",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiling_in_one_graph_changes_no_number(traced, case):
    """All but the reference, which runs between two graphs; `auto` takes slabs instead of it there."""
    assert traced[case] <= (5e-6 if case == "logprob auto" else 1e-7)


def test_compiled_code_still_refuses_a_stray_target(traced):
    assert "target[4] = 777 is outside [0, 777)" in traced["stray"]


@pytest.mark.slow
def test_inductor_changes_nothing_either():
    found = calls("inductor")
    assert max(value for case, value in found.items() if isinstance(value, float)) <= 2e-6
