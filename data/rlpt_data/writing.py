"""Documents -> a shard folder, atomically.

Everything goes to a hidden neighbour first, is flushed to disk, the manifest last, and one rename
makes it visible: a folder with a manifest is complete, whatever was killed when.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rlpt_data.manifest import (
    FORMAT_VERSION,
    NAME,
    SPLITS,
    Counts,
    FileEntry,
    Manifest,
    digest,
    digest_file,
)
from rlpt_data.shards import SCHEMA, TOKENIZER, Document
from rlpt_data.strict import UserError


@dataclass(frozen=True)
class Facts:
    """What the manifest says beyond the rows themselves."""

    vocab_size: int
    split_by: Literal["domain", "document", "source"] = "document"
    config: Mapping[str, Any] = field(default_factory=dict)
    input_hash: str | None = None
    drops: Mapping[str, int] = field(default_factory=dict)
    drop_samples: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    created_by: Mapping[str, str] = field(default_factory=dict)


def write_folder(
    out: Path,
    documents: Mapping[str, Sequence[Document]],
    tokenizer_json: bytes | None,
    facts: Facts,
    *,
    shard_bytes: int = 256 << 20,
    rows_per_batch: int = 256,
    overwrite: bool = False,
) -> Manifest:
    """Write splits (name -> documents, in the order given) to ``out``.

    Raises UserError when ``out`` exists and ``overwrite`` is False.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out}: already there; give --overwrite or another out")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = list(_write_splits(partial, documents, shard_bytes, rows_per_batch))
    files += _write_drops(partial, facts.drop_samples)
    if tokenizer_json is not None:
        files.append(_write(partial, TOKENIZER, tokenizer_json, rows=0))
    manifest = _manifest(documents, tokenizer_json, facts, files)
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    _write(partial, NAME, f"{text}\n".encode(), rows=0)
    _swap(partial, out)
    return manifest


def _manifest(
    documents: Mapping[str, Sequence[Document]],
    tokenizer_json: bytes | None,
    facts: Facts,
    files: Sequence[FileEntry],
) -> Manifest:
    manifest = Manifest(
        version=FORMAT_VERSION,
        hash="",
        tokenizer_hash=None if tokenizer_json is None else digest(tokenizer_json),
        vocab_size=facts.vocab_size,
        split_by=facts.split_by,
        counts={name: _counts(rows) for name, rows in documents.items()},
        drops=dict(sorted(facts.drops.items())),
        files=tuple(files),
        config=dict(facts.config),
        input_hash=facts.input_hash,
        created_by=dict(facts.created_by),
    )
    return manifest.model_copy(update={"hash": manifest.content_hash()})


def _counts(rows: Sequence[Document]) -> Counts:
    return Counts(
        documents=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        bytes=sum(int(row.offsets[-1]) for row in rows),
    )


def _write_splits(
    folder: Path, documents: Mapping[str, Sequence[Document]], shard_bytes: int, per_batch: int
) -> Iterator[FileEntry]:
    for name in documents:
        assert name in SPLITS, f"split {name!r}"
        for number, rows in enumerate(_shards(documents[name], shard_bytes)):
            yield _write_shard(folder, f"{name}/{number:05d}.arrow", rows, per_batch)


def _shards(rows: Sequence[Document], shard_bytes: int) -> Iterator[list[Document]]:
    """Consecutive runs of rows of about ``shard_bytes`` each."""
    shard: list[Document] = []
    size = 0
    for row in rows:
        shard.append(row)
        size += int(row.offsets[-1]) + 4 * (len(row.ids) + len(row.offsets) + len(row.cuts))
        if size >= shard_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_shard(folder: Path, name: str, rows: list[Document], per_batch: int) -> FileEntry:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for start in range(0, len(rows), per_batch):
                writer.write_batch(_batch(rows[start : start + per_batch]))
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(
        path=name, rows=len(rows), bytes=path.stat().st_size, blake2b=digest_file(path)
    )


def _batch(rows: Sequence[Document]) -> pa.RecordBatch:
    columns = [
        pa.array([_cell(row, column.name) for row in rows], type=column.type) for column in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _cell(row: Document, column: str) -> Any:
    value = getattr(row, column)
    if column == "thoughts":
        return [{"cut": t.cut, "ids": t.ids, "source": t.source} for t in value] or None
    if column == "target_spans":
        return None if value is None else [{"start": a, "stop": b} for a, b in value]
    return value


def _write_drops(
    folder: Path, samples: Mapping[str, Sequence[Mapping[str, str]]]
) -> Iterator[FileEntry]:
    for reason, rows in sorted(samples.items()):
        lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows]
        yield _write(folder, f"dropped/{reason}.jsonl", "".join(lines).encode(), rows=len(rows))


def _write(folder: Path, name: str, data: bytes, rows: int) -> FileEntry:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path=name, rows=rows, bytes=len(data), blake2b=digest(data))


def _swap(partial: Path, out: Path) -> None:
    """Rename into place; an old folder steps aside first and is removed last."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    handle = os.open(out.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    shutil.rmtree(old, ignore_errors=True)
