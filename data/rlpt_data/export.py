"""Shards -> Parquet files of pairs, for trainers that read one prompt a row.

A row is one candidate cut; which columns hold its text is the layout. Rows are copies, so whole
contexts take the square of a document's length: limit them. What comes in streams through, a row
group at a time, and appears under its name when all of it is on disk.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlpt_data.pairs import Limits, Pair, pairs_of
from rlpt_data.progress import shown
from rlpt_data.provenance import licence_of
from rlpt_data.shards import Document, ShardFolder, Split
from rlpt_data.store import flush, writer_name
from rlpt_data.strict import UserError
from rlpt_data.workers import full_disk

Layout = Literal["trl", "verl", "verifiers"]
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20
"""A row group ends where either is reached."""
ABILITY = "continuation"

_IDS = pa.list_(pa.uint32())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_REWARD = pa.struct([("style", pa.string()), ("ground_truth", pa.string())])
_INFO = pa.struct([("index", pa.int64()), ("split", pa.string()), ("pair_id", pa.string())])
_EVERY_LAYOUT = [
    ("pair_id", pa.string()),
    ("document_id", pa.string()),
    ("url", pa.string()),
    ("domain", pa.string()),
    ("licence", pa.string()),
    ("split", pa.string()),
    ("cut_kind", pa.string()),
    ("cut_byte", pa.int64()),
    ("context_ids", _IDS),
    ("continuation_ids", _IDS),
]


@dataclass(frozen=True)
class Row:
    """One pair with its text, before a layout names its columns."""

    index: int
    source: str
    """Name of the shard folder."""
    split: str
    licence: str | None
    document: Document
    data: bytes
    """The document's text."""
    pair: Pair

    @property
    def context(self) -> str:
        return self._text(self.pair.start, self.pair.cut)

    @property
    def continuation(self) -> str:
        return self._text(self.pair.cut, self.pair.stop)

    @property
    def num_bytes(self) -> int:
        """About what the row takes."""
        pair, offsets = self.pair, self.document.offsets
        return int(offsets[pair.stop] - offsets[pair.start]) + 4 * (pair.stop - pair.start)

    @property
    def info(self) -> dict[str, Any]:
        return {"index": self.index, "split": self.split, "pair_id": self.pair_id}

    @property
    def pair_id(self) -> str:
        return f"{self.document.document_id}-{self.document.offsets[self.pair.cut]}"

    def _text(self, start: int, stop: int) -> str:
        return self.data[self.document.offsets[start] : self.document.offsets[stop]].decode()

    def common(self) -> dict[str, Any]:
        """The columns that every layout has."""
        document, pair = self.document, self.pair
        return {
            "pair_id": self.pair_id,
            "document_id": document.document_id,
            "url": document.url,
            "domain": document.domain,
            "licence": self.licence,
            "split": self.split,
            "cut_kind": pair.kind,
            "cut_byte": int(document.offsets[pair.cut]),
            "context_ids": document.ids[pair.start : pair.cut],
            "continuation_ids": document.ids[pair.cut : pair.stop],
        }


@dataclass(frozen=True)
class _Columns:
    """The columns of one layout beyond those of all."""

    types: list[tuple[str, pa.DataType]]
    of: Callable[[Row], dict[str, Any]]


LAYOUTS: dict[str, _Columns] = {
    "trl": _Columns(
        [("prompt", pa.string()), ("completion", pa.string())],
        lambda row: {"prompt": row.context, "completion": row.continuation},
    ),
    "verl": _Columns(
        [
            ("data_source", pa.string()),
            ("prompt", _MESSAGES),
            ("ability", pa.string()),
            ("reward_model", _REWARD),
            ("extra_info", _INFO),
        ],
        lambda row: {
            "data_source": row.source,
            "prompt": [{"role": "user", "content": row.context}],
            "ability": ABILITY,
            "reward_model": {"style": "rule", "ground_truth": row.continuation},
            "extra_info": row.info,
        },
    ),
    "verifiers": _Columns(
        [
            ("question", pa.string()),
            ("answer", pa.string()),
            ("task", pa.string()),
            ("info", _INFO),
        ],
        lambda row: {
            "question": row.context,
            "answer": row.continuation,
            "task": ABILITY,
            "info": row.info,
        },
    ),
}


def export_pairs(
    path: Path, out: Path, split: str, layout: Layout, limits: Limits
) -> dict[str, Any]:
    """Write the pairs of a split to a file (*.parquet), or to a folder with a file a shard.

    Returns how many pairs of how many documents. Raises UserError when ``out`` is already there, and
    when no cut leaves enough on both sides.
    """
    folder = ShardFolder.open(path)
    documents = folder.split(split)
    if out.exists():
        raise UserError(f"{out}: already there; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{writer_name()}")
    export = _Export(folder, split, layout, limits)
    try:
        if out.suffix == ".parquet":
            export.write(partial, documents)
        else:
            partial.mkdir()
            for name in folder.shard_files():
                if name.startswith(f"{split}/"):
                    export.write(partial / f"{split}-{Path(name).stem}.parquet", folder.file(name))
        if not export.num_pairs:
            raise UserError(
                f"{path}, split {split}: no cut leaves enough on both sides; lower the limits"
            )
        partial.rename(out)
    except OSError as error:
        raise full_disk(error) or error from error
    finally:
        _remove(partial)
    return {"out": str(out), "pairs": export.num_pairs, "documents": export.num_documents}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Export:
    """Counts on over the files of one export."""

    def __init__(self, folder: ShardFolder, split: str, layout: Layout, limits: Limits) -> None:
        self.num_pairs = 0
        self.num_documents = 0
        """Documents with a pair."""
        self._split = split
        self._limits = limits
        self._columns = LAYOUTS[layout]
        self._source = folder.path.resolve().name
        self._licence = licence_of(folder.manifest.config)
        facts = {"shards": folder.manifest.hash, "layout": layout, **asdict(limits)}
        fields = [*_EVERY_LAYOUT, *self._columns.types]
        self._schema = pa.schema(fields, metadata={"rlpt": json.dumps(facts)})

    def write(self, path: Path, documents: Split) -> None:
        """One file: what is in memory is a row group."""
        with path.open("wb") as file:
            with pq.ParquetWriter(file, self._schema, compression="zstd") as writer:
                for group in _groups(self._rows(documents)):
                    writer.write_batch(self._batch(group))
            flush(file)

    def _rows(self, documents: Split) -> Iterator[Row]:
        for document in shown(documents, f"export {documents.name}", len(documents)):
            data, before = document.text.encode(), self.num_pairs
            for pair in pairs_of(document, self._limits):
                facts = (self.num_pairs, self._source, self._split, self._licence)
                yield Row(*facts, document, data, pair)
                self.num_pairs += 1
            self.num_documents += self.num_pairs > before

    def _batch(self, group: list[Row]) -> pa.RecordBatch:
        cells = [row.common() | self._columns.of(row) for row in group]
        columns = [
            pa.array([row[field.name] for row in cells], field.type) for field in self._schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += row.num_bytes
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
