"""`rlpt eval` on real shards and a fresh policy: files, numbers and refusals."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlpt.config import EvalJobConfig
from rlpt.evaluate.job import decoder, neutral_ids, run, unit_of
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse


@pytest.fixture(scope="module")
def shards_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "corpus").mkdir()
    for n in range(240):
        lines = [
            f"Page {n} counts {k * n % 13} boats, then {k + n} </think> carts." for k in range(9)
        ]
        (folder / "corpus" / f"{n}.txt").write_text("\n\n".join(lines))
    table = {
        "out": str(folder / "shards"),
        "source": {"kind": "folder", "path": str(folder / "corpus")},
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
    }
    prepare(parse(PrepareConfig, table, "test"))
    return folder / "shards"


def job(shards_dir: Path, out: Path, **changed) -> EvalJobConfig:
    table = {
        "policy": {"fresh": {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32}},
        "shards": str(shards_dir),
        "out_dir": str(out),
        "prompts": {"context_tokens": 24, "min_context_tokens": 4, "horizon_tokens": 3},
        "thought": {"budget_tokens": 3},
        "evaluation": {
            "split": "train",
            "prompts": 36,
            "bootstrap": 40,
            "bits_per_byte_documents": 4,
        },
    }
    return parse(EvalJobConfig, table | changed, "test")


def test_a_job_writes_its_files_and_returns_its_headline(shards_dir, tmp_path):
    found = run(job(shards_dir, tmp_path / "out"))
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


def test_the_same_job_twice_gives_the_same_file(shards_dir, tmp_path):
    first, second = (json.loads(_evaluated(shards_dir, tmp_path / name)) for name in "ab")
    assert {**first, "config": None} == {**second, "config": None}


def _evaluated(shards_dir: Path, out: Path) -> str:
    run(job(shards_dir, out))
    return (out / "eval.json").read_text()


def test_a_run_that_is_not_there_is_refused(shards_dir, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        run(job(shards_dir, tmp_path, policy=None, run=f"{tmp_path}@last"))


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
