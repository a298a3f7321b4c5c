"""A proxy's opinion of every token: the numbers of one forward, and cuts that a query selects."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt.annotate import annotate, scored
from rlpt_data.annotations import Annotation, ahead, chosen, find, read
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.shards import CUT_KINDS, ShardFolder, verify_folder
from rlpt_data.strict import UserError

CORPUS = Path(os.environ.get("RLPT_CORPUS", Path(__file__).parents[2] / "../shared/corpus"))
MODEL = CORPUS / "stories260k/hf"
WINDOWS = {"window": 64, "short_window": 16}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MODEL.is_dir():
        pytest.skip(f"no pretrained model in {MODEL}")
    folder = tmp_path_factory.mktemp("annotate")
    story = "Once upon a time there was a little {0}. The {0} liked to play in the park with Tom. "
    rows = [{"text": story.format(f"{w} {n}") * 6} for n in range(8) for w in ("cat", "dog", "boy")]
    (folder / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": str(folder / "in.jsonl")},
        "tokenizer": {"kind": "file", "path": str(MODEL)},
        "split": {"dev": 0.1, "test": 0.1},
        "num_shards": 2,
    }
    prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    annotate(folder / "shards", MODEL, **WINDOWS)
    return folder / "shards"


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    if not MODEL.is_dir():
        pytest.skip(f"no pretrained model in {MODEL}")
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def by_hand(model, ids: torch.Tensor, at: int, start: int) -> tuple[float, float, int]:
    """Entropy, loss and rank of token ``at`` after the tokens from ``start`` on, in float64."""
    with torch.no_grad():
        logp = model(ids[None, start:at]).logits[0, -1].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum().item()
    return entropy, -logp[ids[at]].item(), int((logp > logp[ids[at]]).sum())


def test_values_are_those_of_one_token_at_a_time(model) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 512, 75))
    for batch_tokens in (16, 64, 10_000):
        entropy, loss, rank = scored(model, ids, 16, batch_tokens)
        assert torch.isnan(entropy[0])
        assert torch.isnan(loss[0])
        for at in (1, 5, 15, 16, 23, 24, 31, 32, 63, 64, 70, 74):
            # A window of 16 starts every 8; the first of them that holds token `at` in its second half.
            start = 0 if at < 16 else 8 * (at // 8 - 1)
            expected = by_hand(model, ids, at, start)
            found = (entropy[at].item(), loss[at].item())
            assert found == pytest.approx(expected[:2], abs=2e-5)
            # Two tokens nearly as likely can change places in float32.
            assert abs(int(rank[at]) - expected[2]) <= 1


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 24, 25])
def test_every_token_of_every_length_is_scored_once(model, size: int) -> None:
    entropy, loss, _ = scored(model, torch.full((size,), 5), 16, 64)
    assert len(loss) == size
    assert torch.isfinite(loss[1:]).all()
    assert torch.isfinite(entropy[1:]).all()


def test_sidecars_hold_a_row_for_every_document_and_are_made_once(shards: Path) -> None:
    folder = ShardFolder.open(shards)
    path, facts = find(shards, "", folder.shard_files())
    assert facts.model == "hf"
    for name in folder.shard_files():
        rows = list(read(path / name))
        documents = list(folder.file(name))
        assert [r.document_id for r in rows] == [d.document_id for d in documents]
        assert [len(r.loss) for r in rows] == [d.num_tokens for d in documents]
    verify_folder(shards)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.arrow")}
    assert annotate(shards, MODEL, **WINDOWS)["tokens"] == 0
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*.arrow")}


def test_a_query_gives_cuts_whose_values_hold(shards: Path) -> None:
    query = AnnotatedCuts(min_loss=1.0, max_entropy=5.0, min_context=4, min_continuation=4)
    split = ShardFolder.open(shards).split("train", query)
    values = {row.document_id: row for row in _rows(shards)}
    assert split.flat_cuts.tolist() == [cut for document in split for cut in document.cuts]
    assert split.num_cuts.sum() > 0
    for document in split:
        row = values[document.document_id]
        assert (row.loss[document.cuts] >= 1.0).all()
        assert (row.entropy[document.cuts] <= 5.0).all()
        assert set(document.cut_kinds.tolist()) <= {CUT_KINDS.index("annotated")}
        text = document.text.encode()
        assert all(text[at : at + 1].isspace() for at in document.offsets[document.cuts])
    hard = AnnotatedCuts(tier=(0.8, 1.0), min_context=4, min_continuation=4)
    easy = AnnotatedCuts(tier=(0.0, 0.2), min_context=4, min_continuation=4)
    losses = [
        np.concatenate([values[d.document_id].loss[d.cuts] for d in folder])
        for folder in (ShardFolder.open(shards).split("train", q) for q in (hard, easy))
    ]
    assert losses[0].min() > losses[1].max()


def _rows(shards: Path):
    path, facts = find(shards, "", ShardFolder.open(shards).shard_files())
    return [row for name in facts.files for row in read(path / name)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"min_entropy": 2.0}, [2, 4, 6, 7]),
        ({"min_entropy": 2.0, "max_entropy": 3.0}, [2, 6]),
        ({"top_share": 0.25}, [4, 7]),
        ({"max_loss": 1.0, "min_short_loss": 2.0}, [3, 6]),  # hard, and easy with the context
        ({"min_entropy": 2.0, "min_spacing": 3}, [2, 6]),
        ({"horizon": 2, "min_loss": 2.5}, [1, 3, 4]),
        ({"min_loss": 99.0}, []),
    ],
)
def test_each_bound_is_a_bound(query: dict, expected: list[int]) -> None:
    def row(*values: float) -> np.ndarray:
        return np.array(values, np.float32)

    nan = np.nan
    annotation = Annotation(
        "d",
        entropy=row(nan, 1, 2, 1, 9, 0, 3, 4),
        loss=row(nan, 2, 3, 1, 4, 2, 0, 2),
        short_loss=row(nan, 1, 1, 2, 4, 1, 3, 1),
        rank=np.zeros(8, np.uint32),
    )
    allowed = np.arange(1, 8)
    found = chosen(annotation, allowed, AnnotatedCuts(**query), None)
    assert found.tolist() == expected


def test_means_ahead_are_those_of_the_next_tokens() -> None:
    found = ahead(np.array([np.nan, 1, 2, 6], np.float32), 2)
    assert found.tolist()[1:3] == [1.5, 4.0]
    assert np.isnan(found[[0, 3]]).all()


def test_what_does_not_belong_together_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = ShardFolder.open(shards)
    with pytest.raises(UserError, match=r"none match proxy = 'ff'"):
        folder.split("train", AnnotatedCuts(proxy="ff"))
    with pytest.raises(UserError, match="the query selects no position"):
        folder.split("train", AnnotatedCuts(min_loss=1e9))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model folder"):
        annotate(shards, tmp_path / "empty")
    with pytest.raises(UserError, match="takes 512 tokens; give --window 512 or less"):
        annotate(shards, MODEL, window=1024)
    other = tmp_path / "model"
    other.mkdir()
    for file in MODEL.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    table = json.loads((other / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    names = [name for name, index in vocabulary.items() if index in (400, 401)]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        annotate(shards, other)
