"""Files of a shard folder that are no longer what was written: each is named in one line, none is followed out of its
bounds. All of these were found by fuzzing (tests/fuzz)."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlpt_data import annotations
from rlpt_data.contamination import Index
from rlpt_data.documents import Drop
from rlpt_data.ledger import Ledger
from rlpt_data.manifest import digest, parse_manifest
from rlpt_data.plan import make_plan
from rlpt_data.shards import SCHEMA, ShardFolder, Split, read_drop_samples
from rlpt_data.sources import jsonl, parquet, warc_records
from rlpt_data.sources.html_text import text_of
from rlpt_data.sources.http_payload import PayloadError, response
from rlpt_data.sources.records import Fields
from rlpt_data.strict import UserError
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs
from rlpt_data.work import WorkFolder
from rlpt_data.workers import Failure
from rlpt_data.writing import Facts, write_folder

BYTES = PlainTokenizer(train_byte_pairs([], 256), "bytes")
ROW = {
    "document_id": digest(b"abcd"), "url": None, "domain": "d", "text": "abcd",
    "ids": [97, 98, 99, 100], "offsets": [0, 1, 2, 3, 4], "cuts": [1, 3], "cut_kinds": [1, 3],
    "thoughts": [{"cut": 2, "ids": [97], "source": "s"}], "target_spans": [{"start": 0, "stop": 2}],
}  # fmt: skip


def split_of(path: Path, batch: pa.RecordBatch) -> Split:
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)
    return Split("train", [path], vocab_size=256)


def rows(**changes: object) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([ROW | changes], schema=SCHEMA)


def test_a_row_as_it_should_be_is_read(tmp_path: Path) -> None:
    assert split_of(tmp_path / "x.arrow", rows())[0].ids.tolist() == [97, 98, 99, 100]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"ids": [97, 98, 99, 256]}, "an id lies outside the vocabulary"),
        ({"thoughts": [{"cut": 2, "ids": [256], "source": "s"}]}, "an id lies outside"),
        ({"thoughts": [{"cut": 4, "ids": [97], "source": "s"}]}, "a thought lies outside"),
        ({"thoughts": [{"cut": None, "ids": [97], "source": "s"}]}, "not supported"),
        ({"thoughts": [{"cut": 1, "ids": None, "source": "s"}]}, "NoneType"),
        ({"ids": [], "offsets": [0], "cuts": [], "cut_kinds": []}, "it has no tokens"),
        ({"offsets": [0, 1, 2, 3, 9]}, "offsets do not run"),
        ({"offsets": [0, 1, 1, 3, 4]}, "offsets do not run"),
        ({"offsets": [0, 1, 2, 3]}, "offsets do not run"),
        ({"cuts": [1, 4]}, "cuts do not increase"),
        ({"cuts": [0, 3]}, "cuts do not increase"),
        ({"cuts": [3, 1]}, "cuts do not increase"),
        ({"cut_kinds": [1]}, "cut kinds do not match"),
        ({"cut_kinds": [1, 6]}, "cut kinds do not match"),
        ({"cut_kinds": [1, None]}, "null"),
        ({"target_spans": [{"start": 2, "stop": 5}]}, "target spans overlap"),
        ({"target_spans": [{"start": None, "stop": 3}]}, "not supported"),
    ],
)
def test_a_row_that_points_outside_itself_is_refused_where_it_is_read(
    tmp_path: Path, changes: dict, rule: str
) -> None:
    split = split_of(tmp_path / "x.arrow", rows(**changes))
    # The checks of shapes in tests see some of them first, in words of their own.
    with pytest.raises(
        UserError, match=f"(?s)split train, document 0: damaged: (.*{rule}|Type-check)"
    ):
        split[0]


@pytest.mark.parametrize("name", ["document_id", "domain", "text", "ids", "cuts", "cut_kinds"])
def test_positions_outside_a_column_are_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    batch = pa.RecordBatch.from_pylist([ROW, ROW], schema=SCHEMA)
    columns, at = list(batch.columns), batch.schema.get_field_index(name)
    kind = np.int64 if name == "text" else np.int32
    offsets = np.frombuffer(columns[at].buffers()[1], kind, 3).copy()
    offsets[1] = 1 << 28
    lying, whole = pa.py_buffer(offsets.tobytes()), columns[at]
    if name in ("ids", "cuts", "cut_kinds"):
        columns[at] = pa.Array.from_buffers(whole.type, 2, [None, lying], children=[whole.values])
    else:
        columns[at] = pa.Array.from_buffers(whole.type, 2, [None, lying, whole.buffers()[2]])
    split = split_of(tmp_path / "x.arrow", pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    views: dict[str, Callable[[], object]] = {
        "document_id": lambda: split.document_ids, "domain": lambda: split.domains,
        "ids": lambda: split.num_tokens, "cuts": lambda: split.flat_cuts,
        "cut_kinds": lambda: split.flat_cut_kinds, "text": lambda: split[0],
    }  # fmt: skip
    for read in (views[name], lambda: split[0]):
        with pytest.raises(UserError, match="damaged"):
            read()


def test_kinds_of_cuts_that_are_not_as_many_are_refused_in_the_flat_view_too(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="cut kinds do not match"):
        _ = split_of(tmp_path / "x.arrow", rows(cut_kinds=[1])).flat_cut_kinds


def test_columns_of_other_types_are_another_version(tmp_path: Path) -> None:
    other = rows().drop_columns("url")
    with pytest.raises(UserError, match="other columns"):
        split_of(tmp_path / "x.arrow", other)


def test_a_damaged_annotation_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "s", {"train": []}, BYTES.json_bytes, Facts(vocab_size=256))
    folder = tmp_path / "s/annotations/0123"
    folder.mkdir(parents=True)
    for text in ("{", "[]", "[" * 5000, '{"window": ' + "9" * 5000):
        (folder / "annotation.json").write_text(text)
        with pytest.raises(UserError, match=r"annotation\.json"):
            annotations.find(tmp_path / "s", "01", {})


def test_the_rows_of_a_sidecar_are_checked_before_they_are_followed(tmp_path: Path) -> None:
    lying = pa.py_buffer(np.array([0, 1 << 30, 1], np.int32).tobytes())
    values = pa.array([1.0], pa.float32())
    columns = [pa.array(["a", "b"])] + [
        pa.Array.from_buffers(
            field.type, 2, [None, lying], children=[values.cast(field.type.value_type)]
        )
        for field in list(annotations.SCHEMA)[1:]
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=annotations.SCHEMA)
    for name, written in (("a", batch), ("b", batch.select(["document_id"]))):
        with pa.ipc.new_file(tmp_path / name, written.schema) as writer:
            writer.write_batch(written)
        with pytest.raises(UserError, match="damaged"):
            list(annotations.read(tmp_path / name))


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "{}",
        "[" * 5000,
        '{"phase": 1}',
        '{"phase": "a", "unit": "u", "basis": "b", "files": 5}',
    ],
    ids=["number", "empty", "deep", "type", "files"],
)
def test_a_damaged_ledger_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"ledger\.jsonl, line 1"):
        Ledger(tmp_path)


def test_a_damaged_sample_of_what_was_dropped_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "s", {"train": []}, BYTES.json_bytes, Facts(vocab_size=256))
    (tmp_path / "s/dropped").mkdir(exist_ok=True)
    for line in ("5", "{}", "[" * 5000):
        (tmp_path / "s/dropped/bad.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"bad\.jsonl, line 1: damaged"):
            read_drop_samples(ShardFolder.open(tmp_path / "s"), "bad")


def test_a_manifest_without_end_is_damaged() -> None:
    deep = b'{"version": 1, "config": ' + b'{"a":' * 300 + b"1" + b"}" * 301
    with pytest.raises(UserError, match="damaged: recursion limit"):
        parse_manifest(deep, "manifest.json")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": 5}, "no model.vocab"),
        ({"model": {"vocab": 5}}, "no list of tokens"),
        ({"model": {"vocab": {"a": -1}}}, "-1 is no id"),
        ({"model": {"vocab": {"a": 1 << 40}}}, "is no id"),
        ({"model": {"vocab": {"a": True}}}, "True is no id"),
        ({"model": {"vocab": ["a"]}}, "no token with its score"),
        ({"added_tokens": 5}, "no list of tokens"),
        ({"added_tokens": [{"id": 1, "content": "x"}]}, "every one needs id, content, special"),
        ({"added_tokens": [{"id": "1", "content": "x", "special": True}]}, "every one needs"),
    ],
)
def test_a_tokenizer_whose_tokens_are_no_numbered_list_is_refused(
    tmp_path: Path, change: dict, what: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BYTES.json_bytes) | change))
    with pytest.raises(UserError, match=what):
        PlainTokenizer.read(tmp_path)


@pytest.mark.parametrize(
    "part",
    [{"pre_tokenizer": 5}, {"pre_tokenizer": {}}, {"normalizer": {"type": "Sequence"}}],
    ids=["number", "untyped", "empty"],
)
def test_a_tokenizer_with_parts_that_are_none_is_not_usable(tmp_path: Path, part: dict) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BYTES.json_bytes) | part))
    with pytest.raises(UserError, match="not usable"):
        PlainTokenizer.read(tmp_path / "tokenizer.json").encode(["a"])


def archive(save: Callable[..., object] = np.savez, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def test_an_index_whose_arrays_are_not_of_one_index_is_none() -> None:
    grams, items, names = np.array([3], np.uint64), np.array([0]), np.frombuffer(b'["a#0"]', "u1")
    good = {"grams0": grams, "items0": items, "names": names, "sizes": np.array([1])}
    assert Index.from_bytes(archive(**good), "x").names == ["a#0"]
    for change in (
        {"items0": np.array([1])}, {"items0": np.array([0, 0])}, {"items0": np.array([0.0])},
        {"sizes": np.array([1, 1])}, {"sizes": np.array(["x"])}, {"sizes": np.array(1)},
        {"names": np.frombuffer(b"[5]", "u1")}, {"names": np.frombuffer(b"5", "u1")},
        {"gramsx": grams, "itemsx": items}, {"grams5": grams}, {"names": np.array([None])},
    ):  # fmt: skip
        with pytest.raises(UserError, match="no index"):
            Index.from_bytes(archive(**good | change), "x")
    with pytest.raises(UserError, match="is compressed"):
        Index.from_bytes(archive(np.savez_compressed, **good), "x")
    with pytest.raises(UserError, match="no index"):
        Index.from_bytes(archive(**good)[:-40], "x")


def test_markup_that_is_none_is_a_comment_as_browsers_have_it() -> None:
    assert text_of("<p>a<![- -x>b<![if gte mso 9]>c<![CDATA[d]]>e") == "abce"


@pytest.mark.parametrize("status", ["9" * 5000, "20", "2000", "\u0662\u0660\u0660"])
def test_a_status_of_other_than_three_digits_is_no_response(status: str) -> None:
    with pytest.raises(PayloadError, match="no HTTP status line"):
        response(f"HTTP/1.1 {status} OK\r\n\r\n".encode("latin-1", "replace"))


def test_a_line_of_lists_without_end_is_a_drop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"text": "b"}\n')
    first, second = jsonl.documents(jsonl.JsonlConfig(kind="jsonl", path=tmp_path / "a.jsonl"))
    assert isinstance(first, Drop)
    assert first.reason == "bad_json"
    assert second.text == "b"  # pyright: ignore


@pytest.mark.parametrize("old", [b"rainy", b"texts"], ids=["value", "name"])
def test_a_table_whose_text_is_not_utf8_is_a_damaged_file(tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["rainy"], "text": ["x"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(old, b"\xff" * 5))
    config = parquet.ParquetConfig(kind="parquet", path=path, fields=Fields(text="texts"))
    (drop,) = parquet.documents(config)
    assert isinstance(drop, Drop)
    assert drop.reason == "damaged_file"


@pytest.mark.parametrize("column", [
    pa.array([2**63 - 1], pa.timestamp("us")),
    pa.array([0], pa.timestamp("us", tz="Nowhere/At-All")),
    pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
], ids=["timestamp", "zone", "date"])  # fmt: skip
@pytest.mark.parametrize("name", ["text", "url"])
def test_a_time_beyond_the_calendar_is_a_damaged_file(
    tmp_path: Path, name: str, column: pa.Array
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"]} | {name: column}), path)
    (drop,) = parquet.documents(parquet.ParquetConfig(kind="parquet", path=path))
    assert isinstance(drop, Drop)
    assert drop.reason == "damaged_file"


@pytest.mark.parametrize("name", ["train/../../x.arrow", "/x.arrow", "..", "x::file:///x.arrow"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "s", {"train": []}, BYTES.json_bytes, Facts(vocab_size=256))
    manifest = tmp_path / "s/manifest.json"
    table = json.loads(manifest.read_text())
    table["files"][0]["path"] = name
    manifest.write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"leads out of the folder; put its own"):
        ShardFolder.open(tmp_path / "s")


def test_a_record_of_thousands_of_digits_is_a_damaged_one(tmp_path: Path) -> None:
    head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {'9' * 5000}\r\n\r\n"
    (tmp_path / "a.warc").write_bytes(head.encode())
    first, *_ = warc_records.records(tmp_path / "a.warc", 100)
    assert isinstance(first, Drop)
    assert first.reason == "damaged_record"


def test_a_sidecar_whose_columns_differ_in_length_is_damaged(tmp_path: Path) -> None:
    row = {
        "document_id": "a",
        "entropy": [1.0],
        "loss": [1.0, 2.0],
        "short_loss": [1.0],
        "rank": [1],
    }
    with pa.ipc.new_file(tmp_path / "a", annotations.SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema=annotations.SCHEMA))
    with pytest.raises(UserError, match="damaged: columns of different lengths"):
        list(annotations.read(tmp_path / "a"))


def test_whatever_a_unit_is_called_and_its_error_says_it_is_set_aside(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", make_plan([], {}, {}), 1, progress=False) as work:
        for name in ("a/b", "\u6c34" * 80 + "a", "\u6c34" * 80 + "b"):
            work._quarantine("read", name, Failure("half of \ud83d", "trace"))
        written = sorted((work.path / "failed").iterdir())
    assert written[0].name == "read-a_b.txt"
    assert len(written) == 3
    assert "half of \\ud83d" in written[0].read_text()


def test_an_index_that_says_more_bytes_than_it_has_is_none() -> None:
    file = io.BytesIO()
    np.savez(file, names=np.zeros(8, np.uint8))
    whole = bytearray(file.getvalue())
    entry = whole.index(b"PK\x01\x02")
    # Both sizes of the archive's table of contents, in the place of the member's own.
    whole[entry + 20 : entry + 28] = 2 * (len(whole) - 20).to_bytes(4, "little")
    with pytest.raises(UserError, match="x: no index"):
        Index.from_bytes(bytes(whole), "x")
