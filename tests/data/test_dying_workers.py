"""A worker that dies is no end of the pass, and a job that kills two is a failure with a name."""

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
