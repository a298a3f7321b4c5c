"""Documents -> a shard folder, atomically.

Everything goes to a hidden neighbour first, is flushed to disk, the manifest last, and one rename
makes it visible: a folder with a manifest is complete, whatever was killed when.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa

from rlpt_data.manifest import (
    FORMAT_VERSION,
    NAME,
    NOTHING,
    SPLITS,
    Counts,
    FileEntry,
    Manifest,
    digest,
    digest_file,
    total,
)
from rlpt_data.shards import SCHEMA, TOKENIZER, Document
from rlpt_data.store import flush
from rlpt_data.strict import UserError

_BATCH_BYTES = 64 << 20


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
    stages: tuple[Mapping[str, Any], ...] | None = None
    sources: Mapping[str, Counts] | None = None
    extras: Mapping[str, bytes] = field(default_factory=dict)
    """Other files of the folder, by name."""


@dataclass(frozen=True)
class Shard:
    """A finished file of rows, wherever it lies now."""

    name: str
    """In the folder: train/00000.arrow."""
    path: Path
    counts: Counts


class ShardWriter:
    """Writes rows to an Arrow file, a batch at a time: memory does not grow with the file."""

    def __init__(self, path: Path, rows_per_batch: int = 256) -> None:
        self._path = path
        self._per_batch = rows_per_batch
        self._rows: list[Document] = []
        self._size = 0
        self.counts = NOTHING

    def __enter__(self) -> "ShardWriter":
        self._file = self._path.open("wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        return self

    def add(self, row: Document) -> None:
        self._rows.append(row)
        self._size += row_bytes(row)
        self.counts = total([self.counts, counts_of(row)])
        if len(self._rows) == self._per_batch or self._size >= _BATCH_BYTES:
            self._write()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._write()
                self._writer.close()
                flush(self._file)

    def _write(self) -> None:
        if self._rows:
            self._writer.write_batch(_batch(self._rows))
        self._rows, self._size = [], 0


def counts_of(row: Document) -> Counts:
    """Of one document."""
    return Counts(documents=1, tokens=len(row.ids), bytes=int(row.offsets[-1]))


def row_bytes(row: Document) -> int:
    """About what a row takes on disk."""
    return int(row.offsets[-1]) + 4 * (len(row.ids) + len(row.offsets) + len(row.cuts))


def write_folder(
    out: Path,
    documents: Mapping[str, Iterable[Document]],
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
    partial = _fresh(out)
    shards = list(_write_splits(partial, documents, shard_bytes, rows_per_batch))
    return _finish(out, partial, shards, tokenizer_json, facts, tuple(documents))


def assemble(
    out: Path, shards: Sequence[Shard], tokenizer_json: bytes | None, facts: Facts
) -> Manifest:
    """Make the folder ``out`` of finished shards, which stay where they are (hard links)."""
    partial = _fresh(out)
    for shard in shards:
        _link(shard.path, partial / shard.name)
    return _finish(out, partial, shards, tokenizer_json, facts, SPLITS)


def _fresh(out: Path) -> Path:
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _finish(
    out: Path,
    partial: Path,
    shards: Sequence[Shard],
    tokenizer_json: bytes | None,
    facts: Facts,
    splits: Sequence[str],
) -> Manifest:
    files = [_entry(partial, shard) for shard in shards]
    files += _write_drops(partial, facts.drop_samples)
    for name, data in sorted(facts.extras.items()):
        files.append(_write(partial, name, data, rows=0))
    if tokenizer_json is not None:
        files.append(_write(partial, TOKENIZER, tokenizer_json, rows=0))
    counts = {name: _total(shards, name) for name in splits}
    manifest = _manifest(counts, tokenizer_json, facts, files)
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    _write(partial, NAME, f"{text}\n".encode(), rows=0)
    _swap(partial, out)
    return manifest


def _entry(folder: Path, shard: Shard) -> FileEntry:
    path = folder / shard.name
    return FileEntry(
        path=shard.name,
        rows=shard.counts.documents,
        bytes=path.stat().st_size,
        blake2b=digest_file(path),
    )


def _total(shards: Sequence[Shard], split: str) -> Counts:
    return total([shard.counts for shard in shards if shard.name.startswith(f"{split}/")])


def _manifest(
    counts: Mapping[str, Counts],
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
        counts=dict(counts),
        drops=dict(sorted(facts.drops.items())),
        stages=None if facts.stages is None else tuple(dict(row) for row in facts.stages),
        sources=None if facts.sources is None else dict(sorted(facts.sources.items())),
        files=tuple(files),
        config=dict(facts.config),
        input_hash=facts.input_hash,
        created_by=dict(facts.created_by),
    )
    return manifest.model_copy(update={"hash": manifest.content_hash()})


def _write_splits(
    folder: Path, documents: Mapping[str, Iterable[Document]], shard_bytes: int, per_batch: int
) -> Iterator[Shard]:
    for split in documents:
        assert split in SPLITS, f"split {split!r}"
        for number, rows in enumerate(_shards(documents[split], shard_bytes)):
            name = f"{split}/{number:05d}.arrow"
            (folder / split).mkdir(exist_ok=True)
            with ShardWriter(folder / name, per_batch) as writer:
                for row in rows:
                    writer.add(row)
            yield Shard(name, folder / name, writer.counts)


def _shards(rows: Iterable[Document], shard_bytes: int) -> Iterator[list[Document]]:
    """Consecutive runs of rows of about ``shard_bytes`` each."""
    shard: list[Document] = []
    size = 0
    for row in rows:
        shard.append(row)
        size += row_bytes(row)
        if size >= shard_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


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
