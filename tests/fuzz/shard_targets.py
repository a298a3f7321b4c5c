"""A folder of shards (documents, manifest, annotations, tokenizer), and what prepare keeps of its work."""

import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fuzzing import Target
from mutations import Mutate, changed, either, flipped, of_json, of_lines

from rlpt_data import annotations
from rlpt_data.contamination import Index
from rlpt_data.ledger import Entry, Ledger
from rlpt_data.manifest import parse_manifest
from rlpt_data.plan import read_plan
from rlpt_data.shards import SCHEMA, Document, ShardFolder, Split, Thought, read_drop_samples
from rlpt_data.strict import UserError
from rlpt_data.tally import Tally
from rlpt_data.token_bytes import token_bytes
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs
from rlpt_data.verify import broken_rules
from rlpt_data.writing import Facts, write_folder

BYTES = PlainTokenizer(train_byte_pairs([], 256), "bytes")
TEXTS = ("It rains. We stay in.", "Tea & milk: 3 cups.\n\nNo é.", "ab")


def document(text: str, rich: bool = True) -> Document:
    """A row with everything that a row may have."""
    ids = BYTES.encode([text])[0]
    thoughts = (Thought(1, np.array([65, 66], np.uint32), "hand"),) if rich else ()
    return Document(
        document_id=annotations.digest(text.encode()),
        url="https://a.org/x" if rich else None,
        domain="a.org",
        text=text,
        ids=ids,
        offsets=BYTES.offsets(ids),
        cuts=np.array([1], np.uint32),
        cut_kinds=np.array([1], np.uint8),
        thoughts=thoughts,
        target_spans=((0, 1), (1, 2)) if rich else None,
    )


def shard_folder(folder: Path) -> ShardFolder:
    """Three documents."""
    rows = [document(text, rich=n != 1) for n, text in enumerate(TEXTS)]
    write_folder(folder, {"train": rows}, BYTES.json_bytes, Facts(vocab_size=256))
    return ShardFolder.open(folder)


def targets(scratch: Path) -> Iterator[Target]:
    shards = shard_folder(scratch / "shards")
    rows = (shards.path / "train/00000.arrow").read_bytes()
    yield Target("shards: rows", _rows(scratch / "x.arrow"), [rows], _arrow(SCHEMA))
    yield Target(
        "shards: manifest.json",
        lambda data: parse_manifest(data, "manifest.json").content_hash(),
        [(shards.path / "manifest.json").read_bytes()],
        either(flipped, of_json),
    )
    yield from _annotations(scratch, shards)
    yield from _of_prepare(scratch)
    yield Target(
        "tokenizer.json", _tokenizer(scratch / "tokenizer.json"), _tokenizers(), _small_tokenizer
    )


def _rows(file: Path):
    def read(data: bytes) -> None:
        # A file that is mapped must not be cut.
        file.unlink(missing_ok=True)
        file.write_bytes(data)
        split = Split("train", [file])
        for each in split:
            for rule in broken_rules(each, 256, BYTES.token_bytes):
                raise UserError(f"{file}: {rule}")
        assert len(split.document_ids) == len(split.domains) == len(split)
        assert len(split.flat_cuts) == split.cut_offsets[-1] == len(split.flat_cut_kinds)

    return read


# ---- annotations ---------------------------------------------------------------------------------


def _annotations(scratch: Path, shards: ShardFolder) -> Iterator[Target]:
    folder = shards.path / annotations.FOLDER / "0123"
    facts = annotations.AnnotationFacts(
        proxy="0123", model="m", window=8, short_window=4, files=shards.shard_files(), sidecars={}
    )
    folder.mkdir(parents=True)
    annotations.write_facts(folder, facts)
    sample = (folder / annotations.NAME).read_bytes()

    def read_facts(data: bytes) -> None:
        (folder / annotations.NAME).write_bytes(data)
        annotations.check(*annotations.find(shards.path, "01", shards.shard_files()))

    yield Target("annotations: facts", read_facts, [sample], either(flipped, of_json))
    file = scratch / "side.arrow"
    with annotations.SidecarWriter(file) as writer:
        numbers = np.linspace(0, 3, 5, dtype=np.float32)
        ranks = np.arange(5, dtype=np.uint32)
        writer.add([annotations.Annotation("ab", numbers, numbers, numbers, ranks)] * 2)
    rows = file.read_bytes()

    def read_rows(data: bytes) -> None:
        file.unlink(missing_ok=True)
        file.write_bytes(data)
        for row in annotations.read(file):
            with np.errstate(all="ignore"):
                annotations.ahead(row.entropy, 2)

    yield Target("annotations: rows", read_rows, [rows], _arrow(annotations.SCHEMA))


# ---- prepare -------------------------------------------------------------------------------------


def _of_prepare(scratch: Path) -> Iterator[Target]:
    folder = scratch / "work"
    folder.mkdir()
    (folder / "a").write_bytes(b"x")
    tally = Tally.from_json({"entered": {"read": 3}, "dropped": {"read": {"bad": 1}},
                             "samples": {"bad": [["f:1", "why"]]}})  # fmt: skip
    for unit in ("u1", "u2"):
        files = {"a": annotations.digest(b"x")}
        Ledger(folder).add(Entry("read", unit, "basis", files, tally, {"tokens": 3}))

    def read_ledger(data: bytes) -> None:
        (folder / "ledger.jsonl").write_bytes(data)
        entry = Ledger(folder).done("read", "u1", "basis")
        if entry is not None:
            tally.add(entry.tally)
            assert entry.tally.reasons is not None

    lines = (folder / "ledger.jsonl").read_bytes()
    yield Target("prepare: ledger", read_ledger, [lines], of_lines)
    index = Index.of({"q#0": "one two three four five six seven eight nine ten eleven twelve"})

    def read_index(data: bytes) -> None:
        Index.from_bytes(data, "index").hit("one two three four five six seven eight nine ten")

    yield Target("prepare: index", read_index, [index.to_bytes()], either(flipped, _arrays))
    drops = b'{"where": "f:1", "detail": "x"}\n' * 3
    (scratch / "shards/dropped").mkdir()

    def read_plan_and_drops(data: bytes) -> None:
        (folder / "plan.json").write_bytes(data)
        read_plan(folder / "plan.json")
        (scratch / "shards/dropped/bad.jsonl").write_bytes(data)
        for row in read_drop_samples(ShardFolder.open(scratch / "shards"), "bad"):
            assert isinstance(row["where"] + row["detail"], str)

    yield Target("prepare: plan, drops", read_plan_and_drops, [drops], of_lines)


def _arrays(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """A .npz whose arrays are others."""
    with np.load(io.BytesIO(rng.choice(samples))) as found:
        arrays: dict[str, Any] = dict(found)
    name = rng.choice(list(arrays))
    arrays[name] = rng.choice(
        [
            *(np.zeros(0), np.zeros((2, 2)), np.array([2**63], np.uint64), np.array(["x"])),
            *(arrays[name][:-1], arrays[name].astype(float), np.arange(100), np.array(3)),
            np.frombuffer(json.dumps(changed(rng, ["a#1"])).encode(), "u1"),
        ]
    )
    if rng.random() < 0.3:
        arrays[rng.choice(("gramsx", "grams99", "items5", "names", ""))] = arrays.pop(name)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


# ---- tokenizers ----------------------------------------------------------------------------------


def _tokenizers() -> list[bytes]:
    """Byte level with few pairs, and byte fallback."""
    table = json.loads(BYTES.json_bytes)
    table["added_tokens"] = [{"id": 256, "content": "<x>", "special": True}]
    letters = {chr(n): n for n in range(97, 123)} | {f"<0x{n:02X}>": 26 + n for n in range(256)}
    model = {"type": "BPE", "vocab": letters, "merges": [], "byte_fallback": True}
    fallback = table | {"model": model, "pre_tokenizer": None, "decoder": {"type": "ByteFallback"}}
    return [json.dumps(each).encode() for each in (table, fallback)]


def _tokenizer(file: Path):
    def read(data: bytes) -> None:
        file.write_bytes(data)
        pieces = token_bytes(file)
        found = PlainTokenizer.read(file)
        ids = found.encode(["ab c"])[0]
        assert all(int(index) < len(pieces) for index in ids)
        found.decode(ids)

    return read


def _small_tokenizer(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return flipped(rng, samples)
    table = json.loads(rng.choice(samples))
    vocab = table["model"]["vocab"]
    if rng.random() < 0.5:
        few = dict(list(vocab.items())[:3])
        few = changed(rng, few)
        table["model"]["vocab"] = vocab | few if isinstance(few, dict) else few
        return json.dumps(table).encode()
    table["model"]["vocab"] = {}
    table = changed(rng, table)
    if isinstance(table, dict) and isinstance(table.get("model"), dict):
        table["model"]["vocab"] = table["model"].get("vocab") or vocab
    return json.dumps(table).encode()


# ---- Arrow ---------------------------------------------------------------------------------------


def _arrow(schema: pa.Schema) -> Mutate:
    def mutate(rng: random.Random, samples: Sequence[bytes]) -> bytes:
        kind = rng.randrange(3)
        if kind == 0:
            return flipped(rng, samples)
        batch = pa.ipc.open_file(rng.choice(samples)).get_batch(0)
        try:
            return written(_other_values(rng, batch) if kind == 1 else _other_buffers(rng, batch))
        except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError):
            return flipped(rng, samples)

    return mutate


def written(batch: pa.RecordBatch) -> bytes:
    """An Arrow file."""
    file = io.BytesIO()
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue()


def _other_values(rng: random.Random, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows with other values in the same columns, or columns of another name, type or order."""
    if rng.random() < 0.15:
        names = [name for name in batch.schema.names if rng.random() < 0.8]
        return batch.select(rng.sample(names, len(names)))
    if rng.random() < 0.15:
        return pa.RecordBatch.from_pylist([*map(dict, changed(rng, batch.to_pylist()))])
    rows = batch.to_pylist()
    row, number = rng.choice(rows), rng.choice((0, 1, 2, 255, 2**31, 2**32 - 1))
    name = rng.choice(batch.schema.names)
    value = row[name]
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        row[name] = rng.choice(([], value[:-1], value[::-1], [*value, number], value * 3))
        if row[name] and rng.random() < 0.7:
            row[name] = [*row[name]]
            row[name][rng.randrange(len(row[name]))] = number
    elif isinstance(value, list) and value:
        key = rng.choice(list(value[0]))
        value[0][key] = number if isinstance(value[0][key], int) else rng.choice((None, [], "x"))
    else:
        row[name] = rng.choice((None, "", "x" * 99, "\0", rng.choice(rows)[name]))
    return pa.RecordBatch.from_pylist(rows, schema=batch.schema)


def _other_buffers(rng: random.Random, batch: pa.RecordBatch) -> pa.RecordBatch:
    """One column with offsets or bits that lie, as a flipped byte leaves them."""
    columns = batch.columns
    at = rng.randrange(len(columns))
    column, field = columns[at], batch.schema.field(at)
    buffers = [None if b is None else bytearray(b.to_pybytes()) for b in column.buffers()]
    for buffer in rng.sample([b for b in buffers if b], 1):
        for _ in range(rng.choice((1, 1, 8))):
            start = rng.randrange(len(buffer))
            stretch = rng.choice((b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", rng.randbytes(4)))
            buffer[start : start + len(stretch)] = stretch[: len(buffer) - start]
    parts = [None if b is None else pa.py_buffer(bytes(b)) for b in buffers]
    columns[at] = _rebuilt(field.type, len(column), parts)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _rebuilt(kind: pa.DataType, length: int, buffers: list[Any]) -> pa.Array:
    """An array of the buffers that `Array.buffers` lists, unchecked; nested ones take theirs in order."""
    count = 3 if pa.types.is_string(kind) or pa.types.is_large_string(kind) else 2
    if pa.types.is_struct(kind):
        own = [buffers.pop(0)]
        children = [_rebuilt(kind.field(n).type, length, buffers) for n in range(kind.num_fields)]
        return pa.Array.from_buffers(kind, length, own, children=children)
    own = [buffers.pop(0) for _ in range(1 if pa.types.is_null(kind) else count)]
    if pa.types.is_list(kind):
        size = int(np.frombuffer(own[1], np.int32, length + 1)[-1])
        child = _rebuilt(kind.value_type, max(0, min(size, 1 << 16)), buffers)
        return pa.Array.from_buffers(kind, length, own, children=[child])
    return pa.Array.from_buffers(kind, length, own)
