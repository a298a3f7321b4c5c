"""Tiers by the proxy of the shards' annotations, and a job that measures everything by default."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlpt.config import EvaluationConfig, PromptConfig
from rlpt.evaluate.annotated import annotated_entropies
from rlpt.evaluate.job import run
from rlpt.prompts import held_out
from rlpt_data import annotations
from rlpt_data.annotations import Annotation, AnnotationFacts, SidecarWriter, write_facts
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse

CFG = PromptConfig(context_tokens=24, min_context_tokens=4, horizon_tokens=3)


def entropy_of(document: str, size: int) -> np.ndarray:
    """A number of its own for every position of every document; the first has none."""
    value = int(document[:6], 16) % 97 + np.arange(size) / 1000
    value[0] = np.nan
    return value.astype(np.float32)


def annotate(shards: Path, proxy: str) -> None:
    folder, target = ShardFolder.open(shards), shards / annotations.FOLDER / proxy
    files = folder.shard_files()
    for name in files:
        with SidecarWriter(target / name) as writer:
            for document in folder.file(name):
                values = entropy_of(document.document_id, document.num_tokens)
                rank = np.zeros(document.num_tokens, np.uint32)
                writer.add([Annotation(document.document_id, values, values, values, rank)])
    sidecars = {name: annotations.digest_file(target / name) for name in files}
    facts = {"proxy": proxy, "model": "m", "window": 8, "short_window": 4}
    write_facts(target, AnnotationFacts(**facts, files=files, sidecars=sidecars))


@pytest.fixture(scope="module")
def annotated(shards_dir, tmp_path_factory) -> Path:
    shards = tmp_path_factory.mktemp("annotated") / "shards"
    shutil.copytree(shards_dir, shards)
    annotate(shards, "aa11")
    return shards


def test_the_entropy_is_that_of_the_first_token_after_the_cut(annotated, tiny):
    folder = ShardFolder.open(annotated)
    prompts = held_out(folder.split("train"), CFG, tiny.markers, 40, 0, ())
    found = annotated_entropies(folder, "train", prompts, "")
    assert found.keys() == {prompt.key for prompt in prompts}
    for (_, document, cut), entropy in found.items():
        assert entropy == pytest.approx(entropy_of(document, cut + 1)[cut])


def test_shards_without_annotations_have_no_entropies(shards_dir, tiny):
    folder = ShardFolder.open(shards_dir)
    prompts = held_out(folder.split("train"), CFG, tiny.markers, 4, 0, ())
    assert annotated_entropies(folder, "train", prompts, "") == {}
    with pytest.raises(UserError, match="none match proxy = 'aa'"):
        annotated_entropies(folder, "train", prompts, "aa")


def test_of_two_proxies_one_must_be_named(annotated, tiny, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(annotated, shards)
    annotate(shards, "bb22")
    folder = ShardFolder.open(shards)
    prompts = held_out(folder.split("train"), CFG, tiny.markers, 4, 0, ())
    with pytest.raises(UserError, match="it must be one"):
        annotated_entropies(folder, "train", prompts, "")
    assert len(annotated_entropies(folder, "train", prompts, "bb")) == 4


def test_a_job_measures_greedily_looks_for_leaks_and_tells_tiers_by_the_proxy(
    jobs, annotated, tmp_path
):
    asked = {"split": "train", "prompts": 36, "bootstrap": 40, "bits_per_byte_documents": 0}
    run(jobs.job(annotated, tmp_path / "out", evaluation=asked | {"controls": ["filler"]}))
    table = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert table["leak"] == {
        "passes": True,
        "prompts": 8,
        "requests_changed": 0,
        "thoughts_changed": 0,
        "unrepeatable": 0,
    }
    rows = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    tiers = table["entropy_tiers"]
    assert tiers["source"] == "annotations"
    for name in ("easy", "medium", "hard"):
        above = {r["document"] for r in rows if r["annotated_entropy"] > tiers[name]["above"]}
        assert tiers[name]["prompts"] == len(above)
    greedy = np.mean([r["first_correct_greedy"] for r in rows])
    assert table["next_token_accuracy_greedy"]["mean"] == pytest.approx(greedy)
    assert all(r["greedy_thought"] is not None for r in rows)
    assert table["thought"]["entropy"] == pytest.approx(
        sum(r["thought_nats"] for r in rows) / sum(r["thought_actions"] for r in rows)
    )
    for name in ("no_think", "thought", "greedy"):
        assert 0 < table["calibration"][name]["confidence"] < 1
    # A fresh policy of 300 ids knows nothing: about as unsure as can be.
    entropies = [r["entropy_no_think"] for r in rows]
    assert np.log(300) * 0.8 < np.mean(entropies) < np.log(310)


def test_an_empty_thought_is_no_control_by_itself():
    with pytest.raises(UserError, match="add filler"):
        parse(EvaluationConfig, {"controls": ["empty"]}, "test")
    assert parse(EvaluationConfig, {"controls": ["empty", "filler"]}, "test").controls
    assert parse(EvaluationConfig, {"controls": []}, "test").controls == ()
