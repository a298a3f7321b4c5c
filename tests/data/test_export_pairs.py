"""Pairs are the document's bytes, the trainer's cuts, and Parquet that others load."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlpt.config import PromptConfig
from rlpt.prompts import eligible_cuts
from rlpt_data import export
from rlpt_data.export import export_pairs
from rlpt_data.pairs import Limits, Pair, pairs_of, pieces
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import CUT_KINDS, Document, ShardFolder
from rlpt_data.strict import UserError

SENTENCE = "Die Größe der Straße überrascht nicht; \N{SNOWMAN}\N{SNOWMAN} sagt auch Zoë. "
WHOLE = Limits()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents full of characters of several bytes, a byte a token, in three files."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"text": f"Seite {n}. " + SENTENCE * (2 + n % 5), "url": f"https://a.example/{n}"}
        for n in range(30)
    ]
    (folder / "pages.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table = {
        "out": str(folder / "shards"),
        "source": {"kind": "jsonl", "path": str(folder / "pages.jsonl"), "licence": "CC0-1.0"},
        "tokenizer": {"kind": "byte"},
        "cuts": {"min_context": 4, "min_continuation": 4, "random_every": 8},
        "split": {"by": "document", "dev": 0.0, "test": 0.2},
        "num_shards": 3,
        "without_decontamination": True,
    }
    prepare(PrepareConfig.model_validate_json(json.dumps(table)), progress=False)
    return folder / "shards"


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def documents(shards: Path) -> dict[str, Document]:
    return {d.document_id: d for d in ShardFolder.open(shards).split("train")}


def hand_made(text: str, cuts: list[int]) -> Document:
    """A byte a token, with cuts that a source supplied."""
    data = text.encode()
    offsets = np.arange(len(data) + 1, dtype=np.uint32)
    ids = np.frombuffer(data, np.uint8).astype(np.uint32)
    kinds = np.zeros(len(cuts), np.uint8)
    return Document("id", None, "", text, ids, offsets, np.array(cuts, np.uint32), kinds)


def test_context_and_continuation_are_the_bytes_and_ids_of_the_document(
    shards: Path, tmp_path: Path
) -> None:
    report = export_pairs(shards, tmp_path / "pairs.parquet", "train", "trl", WHOLE)
    found = rows_of(tmp_path / "pairs.parquet")
    all_documents = documents(shards)
    for row in found:
        document = all_documents[row["document_id"]]
        assert row["prompt"] + row["completion"] == document.text
        assert row["context_ids"] + row["continuation_ids"] == document.ids.tolist()
        assert len(row["prompt"].encode()) == row["cut_byte"]
        assert (row["url"], row["domain"], row["licence"], row["split"]) == (
            document.url,
            "a.example",
            "CC0-1.0",
            "train",
        )
    # One row for every candidate cut, in their order.
    expected = [
        (document.document_id, int(document.offsets[cut]), CUT_KINDS[kind])
        for document in all_documents.values()
        for cut, kind in zip(document.cuts, document.cut_kinds, strict=True)
    ]
    assert [(r["document_id"], r["cut_byte"], r["cut_kind"]) for r in found] == expected
    assert len({row["pair_id"] for row in found}) == len(found) == report["pairs"]
    assert report["documents"] == len(all_documents)


def test_limits_keep_the_cuts_and_windows_of_the_trainer(shards: Path, tmp_path: Path) -> None:
    limits = Limits(min_context=20, max_context=40, horizon=16)
    export_pairs(shards, tmp_path / "pairs.parquet", "train", "trl", limits)
    found = rows_of(tmp_path / "pairs.parquet")
    all_documents = documents(shards)
    config = PromptConfig(context_tokens=40, min_context_tokens=20, horizon_tokens=16)
    expected = [
        (document.document_id, cut)  # a byte a token: the position is the byte offset
        for document in all_documents.values()
        for cut in eligible_cuts(document, config).tolist()
    ]
    assert [(row["document_id"], row["cut_byte"]) for row in found] == expected
    for row in found:
        data = all_documents[row["document_id"]].text.encode()
        cut, context, continuation = row["cut_byte"], row["prompt"], row["completion"]
        assert data[:cut].endswith(context.encode())
        assert data[cut:].startswith(continuation.encode())
        assert bytes(row["context_ids"]) == context.encode()
        assert bytes(row["continuation_ids"]) == continuation.encode()
        assert min(cut, 40) - 2 <= len(context.encode()) <= 40
        assert 16 <= len(continuation.encode()) <= 18


@pytest.mark.parametrize(
    ("limits", "pair"),
    [
        # a 0, snowman 1 2 3, space 4, o-umlaut 5 6, b 7
        pytest.param(Limits(), Pair(0, 4, 8, "supplied"), id="whole"),
        pytest.param(Limits(max_context=4), Pair(0, 4, 8, "supplied"), id="all-of-it"),
        pytest.param(Limits(max_context=3), Pair(1, 4, 8, "supplied"), id="whole-snowman"),
        pytest.param(Limits(max_context=2), Pair(4, 4, 8, "supplied"), id="no-part-of-snowman"),
        pytest.param(Limits(horizon=1), Pair(0, 4, 5, "supplied"), id="space"),
        pytest.param(Limits(horizon=2), Pair(0, 4, 7, "supplied"), id="character-is-finished"),
        pytest.param(Limits(horizon=4), Pair(0, 4, 8, "supplied"), id="to-the-end"),
        pytest.param(Limits(horizon=5), None, id="too-little-after"),
        pytest.param(Limits(min_context=4), Pair(0, 4, 8, "supplied"), id="just-enough-before"),
        pytest.param(Limits(min_context=5), None, id="too-little-before"),
    ],
)
def test_windows_begin_and_end_with_characters(limits: Limits, pair: Pair | None) -> None:
    document = hand_made("a\N{SNOWMAN} öb", [4])
    assert list(pairs_of(document, limits)) == ([pair] if pair else [])


def test_a_cut_inside_a_character_is_no_pair() -> None:
    document = hand_made("a\N{SNOWMAN} öb", [2, 4, 6])
    assert [pair.cut for pair in pairs_of(document, WHOLE)] == [4]


def test_pieces_are_tokens_or_whole_characters() -> None:
    document = hand_made("a\N{SNOWMAN} öb", [4])
    assert pieces(document, 0, 8) == ["a", "\N{SNOWMAN}", " ", "ö", "b"]
    assert pieces(document, 2, 6) == [" "]


def test_every_layout_has_the_columns_of_its_reader(shards: Path, tmp_path: Path) -> None:
    limits = Limits(max_context=40, horizon=16)
    found = {}
    for layout in ("trl", "verl", "verifiers"):
        path = tmp_path / f"{layout}.parquet"
        export_pairs(shards, path, "test", layout, limits)
        found[layout] = rows_of(path)
    plain = found["trl"]
    for number, (a, b, c) in enumerate(zip(*found.values(), strict=True)):
        info = {"index": number, "split": "test", "pair_id": a["pair_id"]}
        assert b["prompt"] == [{"role": "user", "content": a["prompt"]}]
        assert b["reward_model"] == {"style": "rule", "ground_truth": a["completion"]}
        assert (b["data_source"], b["ability"], b["extra_info"]) == ("shards", "continuation", info)
        assert (c["question"], c["answer"]) == (a["prompt"], a["completion"])
        assert (c["task"], c["info"]) == ("continuation", info)
        assert a["context_ids"] == b["context_ids"] == c["context_ids"]
    assert len(plain) > 30


def test_datasets_loads_a_folder_as_one_table(shards: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_pairs(shards, tmp_path / "pairs", "train", "trl", WHOLE)
    names = sorted(path.name for path in (tmp_path / "pairs").iterdir())
    assert names == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "pairs/*"), split="train", cache_dir=tmp_path / "cache"
    )
    export_pairs(shards, tmp_path / "pairs.parquet", "train", "trl", WHOLE)
    assert loaded.to_list() == rows_of(tmp_path / "pairs.parquet")


def test_row_groups_are_small_compressed_and_the_file_says_what_it_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 100)
    limits = Limits(max_context=40, horizon=16)
    report = export_pairs(shards, tmp_path / "a.parquet", "train", "trl", limits)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes[:-1] == [100] * (len(sizes) - 1)
    assert (sum(sizes), len(sizes)) == (report["pairs"], -(-report["pairs"] // 100))
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    facts = json.loads(file.schema_arrow.metadata[b"rlpt"])
    assert facts == {
        "shards": ShardFolder.open(shards).manifest.hash,
        "layout": "trl",
        "min_context": 1,
        "max_context": 40,
        "horizon": 16,
    }
    # By size alone: 400 bytes and their ids are more than one row, less than many.
    monkeypatch.setattr(export, "GROUP_BYTES", 2_000)
    export_pairs(shards, tmp_path / "b.parquet", "train", "trl", limits)
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups > len(sizes)
    assert rows_of(tmp_path / "b.parquet") == rows_of(tmp_path / "a.parquet")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    shards: Path, tmp_path: Path
) -> None:
    for name in ("pairs", "pairs.parquet"):
        with pytest.raises(UserError, match="no cut leaves enough on both sides; lower the limits"):
            export_pairs(shards, tmp_path / name, "train", "trl", Limits(horizon=10**6))
    with pytest.raises(UserError, match="split 'dev' is empty"):
        export_pairs(shards, tmp_path / "pairs", "dev", "trl", WHOLE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UserError, match="pairs: already there; choose another --out"):
        export_pairs(shards, tmp_path / "pairs", "train", "trl", WHOLE)
