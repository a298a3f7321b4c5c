"""What is written is what is read; what is damaged is named."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rlpt_data.manifest import digest
from rlpt_data.shards import SCHEMA, Document, ShardFolder, Thought, verify_folder
from rlpt_data.strict import UserError
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs
from rlpt_data.verify import broken_rules
from rlpt_data.writing import Facts, write_folder

BYTES = PlainTokenizer(train_byte_pairs([], 256), "bytes")


def u32(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def document(text: str, **changes: object) -> Document:
    ids = BYTES.encode([text])[0]
    fields = {
        "document_id": digest(text.encode()),
        "url": None,
        "domain": "d",
        "text": text,
        "ids": ids,
        "offsets": BYTES.offsets(ids),
        "cuts": u32(2, 3),
        "cut_kinds": np.array([1, 3], np.uint8),
        "thoughts": (Thought(2, u32(5, 6), "hand"), Thought(3, u32(), "empty")),
        "target_spans": ((0, 1), (2, 4)),
    }
    return Document(**(fields | changes))  # pyright: ignore


def write(out: Path, count: int = 5, **options: int) -> ShardFolder:
    rows = [document(f"text {number} é", url=f"u{number}") for number in range(count)]
    sides = {"train": rows[2:], "dev": rows[:1], "test": rows[1:2]}
    write_folder(out, sides, BYTES.json_bytes, Facts(vocab_size=256), **options)  # pyright: ignore
    return ShardFolder.open(out)


def equal(one: Document, other: Document) -> bool:
    def plain(row: Document) -> dict[str, object]:
        fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(row).items()}
        thoughts = [(t.cut, t.ids.tolist(), t.source) for t in row.thoughts]
        return fields | {"thoughts": thoughts}

    return plain(one) == plain(other)


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    bare = document("bare", thoughts=(), target_spans=None, url=None, domain="")
    rich = document("rich text")
    facts = Facts(vocab_size=256)
    write_folder(tmp_path / "s", {"train": [bare, rich]}, BYTES.json_bytes, facts)
    split = ShardFolder.open(tmp_path / "s").split("train")
    assert equal(split[0], bare)
    assert equal(split[1], rich)
    assert split[0].target_spans is None
    file = pa.ipc.open_file(tmp_path / "s/train/00000.arrow").read_all()
    assert file["thoughts"].null_count == 1
    assert [a.dtype for a in (split[1].ids, split[1].offsets, split[1].cuts)] == [np.uint32] * 3


def test_no_spans_and_an_empty_list_of_spans_are_different(tmp_path: Path) -> None:
    rows = [document("none", target_spans=None), document("empty", target_spans=())]
    write_folder(tmp_path / "s", {"train": rows}, BYTES.json_bytes, Facts(vocab_size=256))
    split = ShardFolder.open(tmp_path / "s").split("train")
    assert [row.target_spans for row in split] == [None, ()]


def test_positions_run_over_files_and_batches(tmp_path: Path) -> None:
    rows = [document(f"document number {number}") for number in range(23)]
    options = {"shard_bytes": 1500, "rows_per_batch": 2}
    facts = Facts(vocab_size=256)
    manifest = write_folder(tmp_path / "s", {"train": rows}, BYTES.json_bytes, facts, **options)
    shards = [entry for entry in manifest.files if entry.path.startswith("train/")]
    assert len(shards) > 2
    assert sum(entry.rows for entry in shards) == 23
    split = ShardFolder.open(tmp_path / "s").split("train")
    assert [row.text for row in split] == [row.text for row in rows]
    assert split[22].text == rows[22].text
    assert split.document_ids == [row.document_id for row in rows]
    assert split.num_tokens.tolist() == [len(row.text) for row in rows]
    assert split.num_cuts.tolist() == [2] * 23
    assert split.domains == ["d"] * 23
    for index in (-1, 23):
        with pytest.raises(IndexError):
            split[index]


def test_the_flat_cuts_are_those_of_the_documents_one_after_the_other(tmp_path: Path) -> None:
    none, kinds = u32(), np.array([], np.uint8)
    rows = [
        document(f"document {number}", cuts=none, cut_kinds=kinds)
        if number % 3 == 0
        else document(f"document {number}", cuts=u32(1, 2 + number)[number % 2 :], cut_kinds=k)
        for number, k in ((n, np.array([n % 4, 3], np.uint8)[n % 2 :]) for n in range(17))
    ]
    facts, options = Facts(vocab_size=256), {"shard_bytes": 900, "rows_per_batch": 2}
    write_folder(tmp_path / "s", {"train": rows}, BYTES.json_bytes, facts, **options)
    split = ShardFolder.open(tmp_path / "s").split("train")
    starts = split.cut_offsets
    arrays = (split.flat_cuts, split.flat_cut_kinds, starts)
    assert [array.dtype for array in arrays] == [np.int64] * 3
    assert len(starts) == 17 + 1
    assert starts[-1] == len(split.flat_cuts) == len(split.flat_cut_kinds)
    for number, row in enumerate(rows):
        owned = slice(starts[number], starts[number + 1])
        assert split.flat_cuts[owned].tolist() == row.cuts.tolist()
        assert split.flat_cut_kinds[owned].tolist() == row.cut_kinds.tolist()


def test_counts_and_verify_agree_with_the_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    counts = folder.manifest.counts["train"]
    assert (counts.documents, counts.tokens, counts.bytes) == (3, 27, 27)
    report = verify_folder(tmp_path / "s")
    assert (report["train"], report["dev"], report["test"]) == (3, 1, 1)
    assert folder.token_bytes()[65] == b"A"
    assert folder.encode("A</s>").tolist() == list(b"A</s>")


def test_unknown_and_empty_splits_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "s", {"train": [document("one")]}, None, Facts(vocab_size=256))
    folder = ShardFolder.open(tmp_path / "s")
    with pytest.raises(UserError, match="no split 'valid'; valid: train, dev, test"):
        folder.split("valid")
    with pytest.raises(UserError, match="split 'dev' is empty"):
        folder.split("dev")
    with pytest.raises(UserError, match="this shard has no tokenizer"):
        folder.token_bytes()


def test_a_truncated_shard_is_named_with_both_sizes(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s/train/00000.arrow"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 10)
    expected = rf"train/00000\.arrow: has {size - 10} bytes, the manifest says {size}; run `rlpt"
    with pytest.raises(UserError, match=expected):
        ShardFolder.open(tmp_path / "s")
    file.unlink()
    with pytest.raises(UserError, match=r"00000\.arrow: is missing"):
        ShardFolder.open(tmp_path / "s")


@pytest.mark.parametrize(("old", "new"), [(b"{", b"\xff"), (b'"1.0"', b'"1.1"')])
def test_a_tokenizer_of_the_right_size_and_other_bytes_is_refused_on_opening(
    tmp_path: Path, old: bytes, new: bytes
) -> None:
    expected = str(write(tmp_path / "s").manifest.tokenizer_hash)
    file = tmp_path / "s/tokenizer.json"
    data = file.read_bytes().replace(old, new, 1)
    file.write_bytes(data)
    message = rf"tokenizer\.json: checksum {digest(data)}, the manifest says {expected}; .*prepare"
    with pytest.raises(UserError, match=message):
        ShardFolder.open(tmp_path / "s")


def test_a_tokenizer_that_the_manifest_does_not_know_is_refused(tmp_path: Path) -> None:
    rows = {"train": [document("one")]}
    write_folder(tmp_path / "s", rows, None, Facts(vocab_size=256))
    (tmp_path / "s/tokenizer.json").write_bytes(BYTES.json_bytes)
    with pytest.raises(UserError, match="the manifest says None"):
        ShardFolder.open(tmp_path / "s")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for name in ("train/00000.arrow", "tokenizer.json"):
        file = tmp_path / "s" / name
        data = bytearray(file.read_bytes())
        for place in range(8, len(data), max(1, len(data) // 7)):
            data[place] ^= 1
            file.write_bytes(data)
            with pytest.raises(UserError, match=f"{name}: checksum"):
                verify_folder(tmp_path / "s")
            data[place] ^= 1
        file.write_bytes(data)
    verify_folder(tmp_path / "s")


def test_a_changed_manifest_and_a_stray_file_are_found(tmp_path: Path) -> None:
    write(tmp_path / "s")
    (tmp_path / "s/annotations").mkdir()
    (tmp_path / "s/annotations/entropy.arrow").write_text("a sidecar may be added")
    verify_folder(tmp_path / "s")
    (tmp_path / "s/stray").write_text("x")
    with pytest.raises(UserError, match="stray: not in the manifest"):
        verify_folder(tmp_path / "s")
    (tmp_path / "s/stray").unlink()
    path = tmp_path / "s/manifest.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"vocab_size": 257}))
    with pytest.raises(UserError, match="was changed after it was written"):
        verify_folder(tmp_path / "s")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no manifest here; write the shards with `rlpt data prepare`"),
        ("{", "damaged"),
        ("[]", "not a manifest of format version 1"),
        ('{"version": 2}', "not a manifest of format version 1"),
        ('{"version": 1}', "is missing"),
    ],
)
def test_a_folder_without_a_sound_manifest_is_refused(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        ShardFolder.open(tmp_path)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    file = tmp_path / "s/train/00000.arrow"
    with pa.ipc.new_file(file, SCHEMA.remove(0)):
        pass
    table = json.loads((tmp_path / "s/manifest.json").read_text())
    table["files"][0]["bytes"] = file.stat().st_size
    (tmp_path / "s/manifest.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="other columns than this version's"):
        ShardFolder.open(tmp_path / "s").split("train")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"document_id": "0" * 32}, "its id is not the hash of its text"),
        ({"ids": u32(97, 98, 99, 100, 101)}, "its tokens are not its text"),
        ({"ids": u32(97, 98, 99, 100, 256)}, "an id lies outside the vocabulary"),
        ({"thoughts": (Thought(2, u32(256), ""),)}, "an id lies outside the vocabulary"),
        ({"thoughts": (Thought(5, u32(1), ""),)}, "a thought lies outside the document"),
        ({"offsets": u32(0, 1, 2, 3, 4, 6)}, "offsets do not run from 0 to the text's length"),
        ({"offsets": u32(0, 1, 1, 3, 4, 5)}, "offsets do not run from 0 to the text's length"),
        ({"cuts": u32(3, 2)}, "cuts do not increase inside the document"),
        ({"cuts": u32(0, 2)}, "cuts do not increase inside the document"),
        ({"cuts": u32(2, 5)}, "cuts do not increase inside the document"),
        ({"cut_kinds": np.array([1, 9], np.uint8)}, "cut kinds do not match the cuts"),
        ({"target_spans": ((2, 4), (0, 1))}, "target spans overlap or lie outside"),
        ({"target_spans": ((2, 6),)}, "target spans overlap or lie outside"),
    ],
)
def test_every_invariant_of_a_row_is_checked(changes: dict[str, object], rule: str) -> None:
    assert broken_rules(document("abcdf"), 256, BYTES.token_bytes) == []
    assert broken_rules(document("abcdf", **changes), 256, BYTES.token_bytes) == [rule]


def test_a_document_on_two_sides_or_a_torn_domain_is_found(tmp_path: Path) -> None:
    facts = Facts(vocab_size=256)
    twice = {"train": [document("same")], "dev": [document("same")]}
    write_folder(tmp_path / "twice", twice, BYTES.json_bytes, facts)
    with pytest.raises(UserError, match="is also in train"):
        verify_folder(tmp_path / "twice")
    torn = {"train": [document("first")], "dev": [document("other")]}
    by_domain = Facts(vocab_size=256, split_by="domain")
    write_folder(tmp_path / "torn", torn, BYTES.json_bytes, by_domain)
    with pytest.raises(UserError, match="domain d is in two splits"):
        verify_folder(tmp_path / "torn")


def test_the_hash_names_the_contents_and_not_who_wrote_them(tmp_path: Path) -> None:
    rows = {"train": [document("one")]}
    hashes = [
        write_folder(tmp_path / str(number), rows, BYTES.json_bytes, facts).hash
        for number, facts in enumerate(
            (
                Facts(vocab_size=256),
                Facts(vocab_size=256, created_by={"python": "9"}),
                Facts(vocab_size=256, config={"seed": 1}),
            )
        )
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_killed_writer_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path / "s").manifest.hash

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlpt_data.writing._manifest", killed)
    rows = {"train": [document("new")]}
    for out, overwrite in ((tmp_path / "s", True), (tmp_path / "fresh", False)):
        with pytest.raises(KeyboardInterrupt):
            write_folder(out, rows, None, Facts(vocab_size=256), overwrite=overwrite)
    assert not (tmp_path / "fresh").exists()
    assert ShardFolder.open(tmp_path / "s").manifest.hash == before
    monkeypatch.undo()
    write_folder(tmp_path / "fresh", rows, None, Facts(vocab_size=256))
    assert sorted(path.name for path in (tmp_path / "fresh").iterdir()) == [
        "manifest.json",
        "train",
    ]
