"""A worker that dies is no end of the pass, and a job that kills two is a failure with a name."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from misbehaving import behave

from rlpt_data import workers
from rlpt_data.strict import UserError


def test_a_worker_that_dies_is_replaced_and_its_job_tried_once_more(tmp_path: Path) -> None:
    jobs = [(what, str(tmp_path / what)) for what in ("a", "die once", "b", "die", "raise", "c")]
    found = {job[0]: result for job, result in workers.outcomes(behave, jobs, 2)}
    assert (found["a"], found["die once"]) == ("A", "DIE ONCE")
    for name, error in (("die", "ended from outside, twice"), ("raise", "KeyError: 'raise'")):
        failure = found[name]
        assert isinstance(failure, workers.Failure)
        assert error in failure.error
    with pytest.raises(UserError, match="yours"):
        list(workers.outcomes(behave, [("mistake", ""), ("a", "")], 2))


SLOW_TO_START = """
import sys, time
from pathlib import Path
time.sleep(1.0)

def leave_a_mark(path):
    time.sleep(0.6)
    Path(path).touch()
"""
PASS = """
import sys
from rlpt_data import workers

if __name__ == "__main__":
    from slow_to_start import leave_a_mark

    start = workers._Pool._worker

    def told(pool):
        made = start(pool)
        print("started", flush=True)
        return made

    workers._Pool._worker = told
    list(workers.outcomes(leave_a_mark, sys.argv[1:], 2))
"""


def test_a_worker_whose_pass_was_killed_while_it_started_does_no_job(tmp_path: Path) -> None:
    (tmp_path / "slow_to_start.py").write_text(SLOW_TO_START)
    (tmp_path / "run.py").write_text(PASS)
    marks = [tmp_path / name for name in ("a", "b")]
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), *map(str, marks)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert [process.stdout.readline() for _ in marks] == [b"started\n"] * 2
    # Its jobs are on their way, and no worker has looked for its parent yet.
    time.sleep(0.2)
    process.kill()
    process.communicate()
    time.sleep(3.0)
    assert not any(mark.exists() for mark in marks)
