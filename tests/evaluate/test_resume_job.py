"""A job that was cut off goes on, and ends with the files of one that was not, to the byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlpt import dist
from rlpt.evaluate.files import WHOLE
from rlpt.evaluate.job import run
from rlpt.evaluate.parts import Parts
from rlpt.evaluate.rungs import climbed, tasks
from rlpt.policy import load
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

FILES = ("eval.json", "prompts.parquet")


class InjectedError(Exception):
    pass


def fall_after(parts: int, config, monkeypatch) -> None:
    """Run a job that stands as many new parts and no more."""
    left, write = [parts], Parts._write

    def failing(self, path, value, seconds):
        if not left[0]:
            raise InjectedError
        left[0] -= 1
        write(self, path, value, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "_write", failing)
        with pytest.raises(InjectedError):
            run(config)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_a_job_that_fell_goes_on_to_the_same_bytes(jobs, shards_dir, tmp_path, monkeypatch):
    run(jobs.job(shards_dir, tmp_path / "whole", chunk_prompts=8))
    out, fallen = tmp_path / "fallen", 0
    # 36 prompts in chunks of 8: five parts of each kind. It falls before the first, inside thoughts and inside records.
    for parts in (0, 3, 6):
        fall_after(parts, jobs.job(shards_dir, out, chunk_prompts=8), monkeypatch)
        fallen += parts
        assert len(list((out / "parts").glob("*.json.zst"))) == fallen
        assert not (out / "eval.json").exists()
    run(jobs.job(shards_dir, out, chunk_prompts=8))
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "parts").exists()


@pytest.fixture(scope="module")
def finished(jobs, shards_dir, tmp_path_factory) -> Path:
    """The folder of a finished job."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(jobs.job(shards_dir, out))
    return out


def test_a_finished_job_is_taken_as_it_is(jobs, shards_dir, finished, monkeypatch):
    before = contents(finished)
    monkeypatch.setattr("rlpt.evaluate.job._evaluate", None)
    found = run(jobs.job(shards_dir, finished))
    assert found["gain_heldout"] == jobs.found(finished)["gain_heldout"]
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 5}, "policy_seed = 0, this one has 5"),
        ({"chunk_prompts": 9}, "chunk_prompts = 64, this one has 9"),
        ({"thought": {"budget_tokens": 4}}, r"thought\.budget_tokens = 3, this one has 4"),
    ],
    ids=["seed", "chunk", "budget"],
)
def test_a_changed_job_is_refused_by_the_name_of_the_change(
    jobs, shards_dir, finished, changed, said
):
    before = contents(finished)
    with pytest.raises(UserError, match=said):
        run(jobs.job(shards_dir, finished, **changed))
    assert contents(finished) == before


def test_a_smaller_forward_is_no_other_job(jobs, shards_dir, finished):
    run(jobs.job(shards_dir, finished, evaluation=jobs.EVALUATION | {"batch_tokens": 999}))


def test_shards_of_a_job_are_put_together_to_the_same_bytes(jobs, shards_dir, tmp_path):
    run(jobs.job(shards_dir, tmp_path / "whole", chunk_prompts=8))
    made = []
    for number in (1, 2):
        out = tmp_path / f"machine_{number}"
        run(jobs.job(shards_dir, out, chunk_prompts=8), shard=(number, 2))
        assert not (out / "eval.json").exists()
        made.append({path.name for path in (out / "parts").glob("records*")})
    assert [len(names) for names in made] == [3, 2]
    assert not made[0] & made[1]
    for path in (tmp_path / "machine_2" / "parts").iterdir():
        path.rename(tmp_path / "machine_1" / "parts" / path.name)
    run(jobs.job(shards_dir, tmp_path / "machine_1", chunk_prompts=8))
    assert contents(tmp_path / "machine_1") == contents(tmp_path / "whole")


def test_a_part_of_another_job_or_a_damaged_one_is_refused_by_name(
    jobs, shards_dir, tmp_path, monkeypatch
):
    for out, seed in ((tmp_path / "one", 0), (tmp_path / "other", 1)):
        fall_after(1, jobs.job(shards_dir, out, seed=seed), monkeypatch)
    (strange,) = (tmp_path / "other" / "parts").iterdir()
    own = tmp_path / "one" / "parts" / strange.name
    own.write_bytes(strange.read_bytes())
    with pytest.raises(UserError, match=rf"{strange.name}: is of another task"):
        run(jobs.job(shards_dir, tmp_path / "one"))
    own.write_bytes(strange.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"{strange.name}: damaged"):
        run(jobs.job(shards_dir, tmp_path / "one"))


def job_file(jobs, shards_dir: Path, folder: Path) -> Path:
    """A job of a size that takes a while, on disk."""
    config = jobs.job(shards_dir, folder / "out", chunk_prompts=2).model_dump(mode="json")
    lines = [
        f"shards = {config['shards']!r}",
        f"out_dir = {config['out_dir']!r}",
        "chunk_prompts = 2",
        "[policy.fresh]",
        *(f"{name} = {value}" for name, value in jobs.FRESH.items()),
        "[prompts]\ncontext_tokens = 24\nmin_context_tokens = 4\nhorizon_tokens = 3",
        "[thought]\nbudget_tokens = 3",
        "[evaluation]",
        *(f"{name} = {json.dumps(value)}" for name, value in jobs.EVALUATION.items()),
    ]
    folder.mkdir()
    path = folder / "job.toml"
    path.write_text("\n".join(lines))
    return path


def started(path: Path, ranks: int = 1) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "rlpt.evaluate.job"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (path.parent / "said").open("wb") as said:
        return subprocess.Popen([*command, str(path)], env=environment, stdout=said, stderr=said)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_was_killed_goes_on_to_the_same_bytes(jobs, shards_dir, tmp_path):
    whole, killed = (job_file(jobs, shards_dir, tmp_path / name) for name in ("whole", "killed"))
    assert started(whole).wait() == 0
    parts, seen = tmp_path / "killed" / "out" / "parts", 0
    for least in (5, 25):
        process = started(killed)
        while (seen := len(list(parts.glob("*.json.zst")))) < least:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "out" / "eval.json").exists()
    assert seen >= 25
    assert started(killed).wait() == 0
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.slow
def test_the_batch_does_not_change_what_a_job_finds(jobs, shards_dir, tmp_path):
    """Thoughts are the same; scores differ by less than 1e-6, as sums in another order do."""
    found = []
    for size in (1, 64):
        asked = jobs.EVALUATION | {"batch_documents": size}
        out = tmp_path / str(size)
        run(jobs.job(shards_dir, out, evaluation=asked, engine={"prompts_per_batch": size}))
        found.append(jobs.found(out) | {"config": None})
    rows = [pq.read_table(tmp_path / size / "prompts.parquet").to_pylist() for size in ("1", "64")]
    assert [row["thought_ids"] for row in rows[0]] == [row["thought_ids"] for row in rows[1]]
    assert_close(*found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_find_what_one_does(jobs, shards_dir, tmp_path):
    paths = [job_file(jobs, shards_dir, tmp_path / f"ranks_{ranks}") for ranks in (1, 2)]
    for ranks, path in enumerate(paths, start=1):
        assert started(path, ranks).wait() == 0, (path.parent / "said").read_text()
    one, two = (json.loads((path.parent / "out" / "eval.json").read_text()) for path in paths)
    assert_close(one, two)


def assert_close(one: object, two: object) -> None:
    """Numbers within 1e-6: a matrix product of another shape adds up in another order."""
    if isinstance(one, dict) and isinstance(two, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_close(one[name], two[name])
    elif isinstance(one, list) and isinstance(two, list):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_close(*pair)
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=1e-6, rel=1e-6, nan_ok=True)
    elif not isinstance(one, str) or not any(sign.isdigit() for sign in one):
        assert one == two


def test_a_folder_of_an_unknown_evaluation_is_refused(jobs, shards_dir, tmp_path):
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an evaluation, and no task\.json says which"):
        run(jobs.job(shards_dir, tmp_path))


def test_a_job_that_found_nothing_yet_may_change(jobs, shards_dir, tmp_path):
    with dist.world() as world:
        for seed in (0, 1):
            Parts(tmp_path, task_of(jobs.job(shards_dir, tmp_path, seed=seed), world), world)
    assert json.loads((tmp_path / "task.json").read_text())["seed"] == 1


def test_a_place_that_cannot_be_written_to_is_the_users_mistake(jobs, shards_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written: File exists; "):
        run(jobs.job(shards_dir, tmp_path / "file"))


def test_a_lost_file_is_made_again(jobs, shards_dir, tmp_path):
    config = jobs.job(shards_dir, tmp_path, evaluation=jobs.SMALL)
    run(config)
    before = contents(tmp_path)
    (tmp_path / WHOLE).unlink()
    run(config)
    assert contents(tmp_path) == before
    (tmp_path / WHOLE).write_bytes(b"half")
    with pytest.raises(UserError, match=f"{WHOLE}: damaged"):
        run(config)


def test_parts_that_several_shards_write_at_once_stand(jobs, shards_dir, tmp_path, monkeypatch):
    """Shards share a folder and all sample all thoughts: one must not take the other's unfinished file."""
    with dist.world() as world:
        task = task_of(jobs.job(shards_dir, tmp_path), world)
        one, other = (Parts(tmp_path, task, world) for _ in range(2))
        replace = Path.replace

        def interrupted(path: Path, target: Path) -> Path:
            monkeypatch.undo()
            other("thoughts_0000000", lambda: [1])
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", interrupted)
        assert one("thoughts_0000000", lambda: [1]) == [1]
        assert one("thoughts_0000000", list) == [1]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["thoughts_0000000.json.zst"]


def task_of(config, world):
    folder = ShardFolder.open(config.shards)
    ((_, _, task),) = tasks(config, climbed(config, folder), folder, world)
    return task


@pytest.mark.parametrize("shard", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_the_bar_of_progress_ends_where_the_job_does(jobs, shards_dir, tmp_path, capsys, shard):
    asked = jobs.SMALL | {"greedy": True, "leak_prompts": 2}
    run(jobs.job(shards_dir, tmp_path, chunk_prompts=13, evaluation=asked), shard)
    last = capsys.readouterr().err.splitlines()[-1]
    done, total = last.split()[1].split("/")
    assert done == total


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"prompts": 1}, "needs held-out prompts of two documents"), ({"domains": ["x"]}, "domains")],
    ids=["one document", "no such domain"],
)
def test_what_cannot_be_asked_is_refused_before_a_model_loads(
    jobs, shards_dir, tmp_path, monkeypatch, changed, said
):
    monkeypatch.setattr(load, "load", None)
    evaluation = jobs.EVALUATION | changed
    with pytest.raises(UserError, match=said):
        run(jobs.job(shards_dir, tmp_path, evaluation=evaluation))
