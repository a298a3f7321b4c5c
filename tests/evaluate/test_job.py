"""`rlpt eval` on real shards and a fresh policy: files, numbers and refusals."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlpt import lock
from rlpt.config import PromptConfig, ThoughtConfig
from rlpt.evaluate.job import run
from rlpt.evaluate.rungs import climbed
from rlpt.evaluate.subject import decoder, neutral_ids, unit_of
from rlpt.jobs import EvalJobConfig
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse


def test_a_job_writes_its_files_and_returns_its_headline(jobs, shards_dir, tmp_path):
    found = run(jobs.job(shards_dir, tmp_path / "out"))
    table = json.loads((tmp_path / "out" / "eval.json").read_text())
    rows = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    assert len(rows) == 36 * 2
    gain = sum(r["logp_own"] - r["logp_no_think"] for r in rows) / sum(
        r["num_tokens"] for r in rows
    )
    assert table["gain_heldout"]["mean"] == pytest.approx(gain)
    assert found["gain_heldout"] == table["gain_heldout"]
    assert found["verdict"] == table["verdict"]
    assert table["null"]["passes"]
    assert set(table["controls"]) == {
        "empty",
        "filler",
        "context_copy",
        "other_document",
        "shuffled",
    }
    assert table["shards"] == ShardFolder.open(shards_dir).manifest.hash
    assert table["bits_per_byte"]["documents"] == 4
    assert 0 < table["thought"]["opener_mass"] < 0.1
    for row in rows:
        assert row["continuation"] in texts(shards_dir)[row["document"]]


def texts(shards_dir: Path) -> dict[str, str]:
    return {d.document_id: d.text for d in ShardFolder.open(shards_dir).split("train")}


def test_the_same_job_twice_gives_the_same_files(jobs, shards_dir, tmp_path):
    for name in "ab":
        run(jobs.job(shards_dir, tmp_path / name))
    for file in ("eval.json", "prompts.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_one_folder_has_one_job_and_shards_side_by_side(jobs, shards_dir, tmp_path):
    config = jobs.job(shards_dir, tmp_path / "out")
    with lock.alone(tmp_path / "out"):
        with pytest.raises(UserError, match="another process is at work here"):
            run(config)
        run(config, (1, 2))
    with (
        lock.alone(tmp_path / "out", ".lock_2_of_2"),
        pytest.raises(UserError, match="another process is at work here"),
    ):
        run(config, (2, 2))


def test_a_run_that_is_not_there_is_refused(jobs, shards_dir, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        run(jobs.job(shards_dir, tmp_path, policy=None, run=f"{tmp_path}@last"))


def test_a_job_looks_at_test_whatever_else_its_evaluation_says(jobs, shards_dir, tmp_path):
    assert jobs.job(shards_dir, tmp_path, evaluation={"prompts": 7}).evaluation.split == "test"
    assert jobs.job(shards_dir, tmp_path, evaluation={"split": "dev"}).evaluation.split == "dev"
    table = jobs.job(shards_dir, tmp_path).model_dump(mode="json", exclude={"evaluation"})
    assert parse(EvalJobConfig, table, "test").evaluation.split == "test"


def test_a_job_asks_of_a_checkpoint_what_its_run_asked(jobs, shards_dir, tmp_path):
    run_dir = jobs.saved_run(tmp_path / "run", shards_dir, "float32")
    run(jobs.job_of(run_dir, shards_dir, tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    assert {row["num_tokens"] for row in rows} == {2}
    table = json.loads((tmp_path / "out" / "eval.json").read_text())["config"]
    assert (table["prompts"]["context_tokens"], table["thought"]["budget_tokens"]) == (9, 2)
    own = {"prompts": {"horizon_tokens": 4}, "thought": {"budget_tokens": 1}}
    config = jobs.job_of(run_dir, shards_dir, tmp_path / "own", **own)
    ladder = climbed(config, ShardFolder.open(shards_dir))
    assert ladder.prompts == PromptConfig(horizon_tokens=4)
    assert ladder.thought == ThoughtConfig(budget_tokens=1)


def test_a_job_on_a_policy_asks_by_the_defaults(jobs, shards_dir, tmp_path):
    config = jobs.job(shards_dir, tmp_path, prompts=None, thought=None)
    ladder = climbed(config, ShardFolder.open(shards_dir))
    assert (ladder.prompts, ladder.thought) == (PromptConfig(), ThoughtConfig())


def test_a_run_in_bf16_is_evaluated_in_float32(jobs, shards_dir, tmp_path):
    """The same weights give the same numbers, whatever they were trained in: MEASURING, section 4."""
    tables = []
    for dtype in ("float32", "bfloat16"):
        run_dir = jobs.saved_run(tmp_path / dtype, shards_dir, dtype)
        run(jobs.job_of(run_dir, shards_dir, tmp_path / "out" / dtype))
        tables.append(json.loads((tmp_path / "out" / dtype / "eval.json").read_text()))
    exact, rounded = ({**table, "config": None} for table in tables)
    assert rounded == exact
    assert tables[1]["config"]["policy"]["compute_dtype"] == "float32"
    assert rounded["null"]["limit"] == 1e-5
    assert abs(exact["gain_heldout"]["mean"]) > 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "absent"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "has no 'policy'"),
        ('{"policy": {}, "prompts": {}, "thought": {}}', "exactly one of path"),
    ],
)
def test_a_run_without_a_sound_configuration_is_the_users_mistake(
    jobs, shards_dir, tmp_path, content, said
):
    run_dir = jobs.saved_run(tmp_path / "run", shards_dir, "float32")
    path = run_dir / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"config\.json.*{said}"):
        run(jobs.job_of(run_dir, shards_dir, tmp_path / "out"))


def test_text_is_decoded_byte_for_byte_and_markers_read_as_nothing(shards_dir):
    folder = ShardFolder.open(shards_dir)
    text = "Page 7 counts 3 boats </think>"
    ids = folder.encode(text).tolist()
    assert decoder(folder)([*ids, folder.manifest.vocab_size + 1]) == text


def test_filler_tokens_come_from_the_shards_own_encoding(shards_dir):
    folder = ShardFolder.open(shards_dir)
    assert decoder(folder)(neutral_ids(folder)) == " ."


@pytest.mark.parametrize(
    ("split_by", "unit"), [("domain", "domain"), ("document", "document"), ("source", "document")]
)
def test_the_unit_of_the_bootstrap_is_the_unit_of_the_split(split_by, unit):
    assert unit_of(split_by) == unit
