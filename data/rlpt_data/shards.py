"""The shard format: the only contract between the corpus and the trainer.

A folder holds ``manifest.json``, the tokenizer byte for byte, and per split Arrow IPC files whose
rows are *documents*: token ids, the byte offset of every token, and the positions where the text
may be cut. A cut t means: context = ids[:t]. Pairs are views of a document, never copied text.
Folders are immutable; annotations are sidecar files.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt32

from rlpt_data.columns import Columns, whole
from rlpt_data.manifest import SPLITS, Counts, FileEntry, Manifest, digest_file, read_manifest
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.shard_rows import CUT_KINDS, Document, Thought, misplaced
from rlpt_data.strict import UserError, json_of
from rlpt_data.token_bytes import token_bytes

__all__ = [
    "CUT_KINDS",
    "SCHEMA",
    "SPLITS",
    "Counts",
    "Document",
    "FileEntry",
    "Manifest",
    "ShardFolder",
    "Split",
    "Thought",
    "digest_file",
    "token_bytes",
    "verify_folder",
]

TOKENIZER = "tokenizer.json"
ANNOTATIONS = "annotations"
"""Where sidecar files go: the one place in a folder that may grow after it was written."""

_DAMAGED = (pa.ArrowException, ValueError, TypeError)
"""What Arrow and numpy raise for bytes that are no rows."""
_U32 = pa.list_(pa.field("item", pa.uint32(), nullable=False))
_THOUGHT = pa.struct([("cut", pa.uint32()), ("ids", _U32), ("source", pa.string())])
_SPAN = pa.struct([("start", pa.uint32()), ("stop", pa.uint32())])
SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("ids", _U32, nullable=False),
        pa.field("offsets", _U32, nullable=False),
        pa.field("cuts", _U32, nullable=False),
        pa.field("cut_kinds", pa.list_(pa.field("item", pa.uint8())), nullable=False),
        pa.field("thoughts", pa.list_(_THOUGHT)),
        pa.field("target_spans", pa.list_(_SPAN)),
    ]
)


class Split:
    """The documents of one split, by position; memory-mapped, so opening costs nothing.

    What is damaged is found where it is read: a UserError names it.
    """

    def __init__(self, name: str, paths: list[Path], vocab_size: int | None = None) -> None:
        self.name = name
        self._vocab_size = vocab_size
        self._batches = [batch for path in paths for batch in _batches(path)]
        self._columns: list[Columns | None] = [None] * len(self._batches)
        ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._ends: list[int] = ends.tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of split {self.name!r} with {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        batch = self._batches[number]
        first = self._ends[number] - batch.num_rows
        columns = self._columns[number]
        try:
            if columns is None:
                columns = self._columns[number] = Columns(batch)
            document = self._document(columns, index - first)
            for rule in misplaced(document, self._vocab_size):
                raise ValueError(rule)
            return document
        except _DAMAGED as error:
            raise self._damage(f"document {index}", error) from error

    def _damage(self, where: str, what: object) -> UserError:
        return UserError(
            f"shards, split {self.name}, {where}: damaged: {what}; see `rlpt data verify`, and run "
            "`rlpt data prepare` again"
        )

    def _document(self, columns: Columns, row: int) -> Document:
        return Document(
            document_id=columns.string("document_id", row) or "",
            url=columns.string("url", row),
            domain=columns.string("domain", row) or "",
            text=columns.string("text", row) or "",
            ids=columns.array("ids", row),
            offsets=columns.array("offsets", row),
            cuts=columns.array("cuts", row),
            cut_kinds=columns.array("cut_kinds", row),
            thoughts=tuple(_thought(thought) for thought in columns.objects("thoughts", row) or ()),
            target_spans=_spans(columns.objects("target_spans", row)),
        )

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def num_tokens(self) -> np.ndarray:
        """(documents,) int64."""
        return self._lengths("ids")

    @functools.cached_property
    def num_cuts(self) -> np.ndarray:
        """(documents,) int64."""
        return self._lengths("cuts")

    @functools.cached_property
    def flat_cuts(self) -> Int64[np.ndarray, " C"]:
        """The cuts of every document, one after the other; see ``cut_offsets``."""
        return self._flat("cuts")

    @functools.cached_property
    def flat_cut_kinds(self) -> Int64[np.ndarray, " C"]:
        """Index into CUT_KINDS, one for each of ``flat_cuts``."""
        kinds = self._flat("cut_kinds")
        if len(kinds) != len(self.flat_cuts):
            raise self._damage("column cut_kinds", "cut kinds do not match the cuts")
        return kinds

    @functools.cached_property
    def cut_offsets(self) -> Int64[np.ndarray, " starts"]:
        """(documents + 1,). Document i owns [cut_offsets[i], cut_offsets[i + 1]) of the flat arrays."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.num_cuts)])

    @functools.cached_property
    def document_ids(self) -> list[str]:
        return self._strings("document_id")

    @functools.cached_property
    def domains(self) -> list[str]:
        return self._strings("domain")

    def _lengths(self, column: str) -> np.ndarray:
        return self._numbers(column, lambda part: part.value_lengths())

    def _flat(self, column: str) -> np.ndarray:
        # `flatten` looks at this batch's rows alone; `values` would also see a slice's neighbours.
        return self._numbers(column, lambda part: part.flatten())

    def _numbers(self, column: str, of: Callable[[Any], pa.Array]) -> np.ndarray:
        parts = self._columnwise(column, lambda part: of(part).to_numpy())
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _strings(self, column: str) -> list[str]:
        parts = self._columnwise(column, lambda part: part.to_pylist())
        return [text for part in parts for text in part]

    def _columnwise(self, column: str, read: Callable[[Any], Any]) -> list[Any]:
        """What is read of a column of every batch."""
        try:
            return [read(whole(batch.column(column))) for batch in self._batches]
        except _DAMAGED as error:
            raise self._damage(f"column {column}", error) from error


@dataclass(frozen=True)
class ShardFolder:
    """An opened shard folder."""

    path: Path
    manifest: Manifest
    url: str | None = None
    """Where its files come from when they are first asked for; None: they are all in ``path``."""

    @classmethod
    def open(cls, place: Path | str) -> "ShardFolder":
        """A folder of this machine, or a URL that fsspec reads, with a cache here (``RLPT_CACHE``).

        Cheap checks only: the manifest parses, every file has its size, the tokenizer its hash.

        Raises UserError naming the file, expected and found. ``verify_folder`` reads every byte.
        """
        if "://" in str(place):
            return cls._remote(str(place))
        path = Path(place)
        manifest = read_manifest(path)
        for entry in manifest.files:
            _check_size(path, entry)
        _check_tokenizer(path / TOKENIZER, manifest.tokenizer_hash)
        return cls(path, manifest)

    @classmethod
    def _remote(cls, url: str) -> "ShardFolder":
        from rlpt_data.remote import fetch_manifest

        return cls(*fetch_manifest(url), url)

    def local(self, name: str) -> Path:
        """Where a file of the folder lies on this machine, fetched if need be."""
        if self.url is not None:
            from rlpt_data.remote import fetch

            for entry in self.manifest.files:
                if entry.path == name:
                    fetch(self.url, self.path, entry)
        return self.path / name

    @property
    def tokenizer_path(self) -> Path:
        """Raises UserError when the folder was written without a tokenizer."""
        path = self.local(TOKENIZER)
        if not path.is_file():
            raise UserError(f"{path}: this shard has no tokenizer; name one in [tokenizer]")
        return path

    def token_bytes(self) -> list[bytes]:
        """Bytes of every id; b"" for ids that never stand for text (special tokens)."""
        return token_bytes(self.tokenizer_path)

    def encode(self, text: str) -> UInt32[np.ndarray, " T"]:
        """Ids of ``text`` as the shard encodes it: plain text, nothing in it is special."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " T"]]:
        """Ids of every text, as ``encode`` gives them."""
        from rlpt_data.tokenizer import PlainTokenizer

        return PlainTokenizer.cached(self.tokenizer_path).encode(texts)

    def shard_files(self) -> dict[str, str]:
        """Every file with documents and its checksum."""
        entries = [e for e in self.manifest.files if e.path.endswith(".arrow")]
        return {entry.path: entry.blake2b for entry in entries}

    def file(self, name: str) -> Split:
        """The documents of one file."""
        return Split(name, [self.local(name)], self.manifest.vocab_size)

    def has(self, name: str) -> bool:
        """Whether there are documents in a split."""
        counts = self.manifest.counts.get(name)
        return counts is not None and counts.documents > 0

    def split(self, name: str, query: AnnotatedCuts | None = None) -> Split:
        """One of train, dev and test. Raises UserError when it is unknown or empty.

        With a query the cuts are those it selects, from the annotations of the folder.
        """
        if name not in SPLITS:
            raise UserError(f"{self.path}: no split {name!r}; valid: {', '.join(SPLITS)}")
        entries = [e for e in self.manifest.files if e.path.startswith(f"{name}/")]
        split = Split(name, [self.local(e.path) for e in entries], self.manifest.vocab_size)
        if not len(split):
            raise UserError(f"{self.path}: split {name!r} is empty; prepare it with [split] {name}")
        if query is None:
            return split
        from rlpt_data.annotated import AnnotatedSplit

        return AnnotatedSplit(self, name, query)


def verify_folder(path: Path, index: Path | None = None) -> dict[str, Any]:
    """Read every byte: checksums, and every invariant of every row.

    Returns counts of what was checked; raises UserError naming the file and what is wrong. An
    ``index`` of evaluation sets replaces the folder's own.
    """
    # The checks need the reader above, so they live behind it.
    from rlpt_data.verify import verify

    return verify(path, index)


def read_drop_samples(folder: ShardFolder, reason: str) -> list[dict[str, str]]:
    """Samples of what was left out for ``reason``: where and detail."""
    # Lines of bytes: in a text U+2028 and U+0085 end one, too.
    path = folder.local(f"dropped/{reason}.jsonl")
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [_drop_sample(line, f"{path}, line {number}") for number, line in lines]


def _drop_sample(line: bytes, where: str) -> dict[str, str]:
    try:
        row = json_of(line)
        return {"where": str(row["where"]), "detail": str(row["detail"])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: damaged: {error}; run `rlpt data prepare` again") from error


def _check_size(folder: Path, entry: FileEntry) -> None:
    file = folder / entry.path
    found = file.stat().st_size if file.is_file() else None
    if found == entry.bytes:
        return
    what = "is missing" if found is None else f"has {found} bytes"
    raise UserError(
        f"{file}: {what}, the manifest says {entry.bytes}; run `rlpt data prepare` again"
    )


def _check_tokenizer(file: Path, expected: str | None) -> None:
    """Checkpoints trust this hash: ids of another tokenizer would load and mean other text."""
    found = digest_file(file) if file.is_file() else None
    if found != expected:
        raise UserError(
            f"{file}: checksum {found}, the manifest says {expected}; put the file it was written "
            "with back, or run `rlpt data prepare` again"
        )


def _batches(path: Path) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged: {error}; run `rlpt data prepare` again") from error
    if not reader.schema.equals(SCHEMA):
        raise UserError(f"{path}: other columns than this version's; run `rlpt data prepare` again")
    return batches


def _thought(row: dict[str, Any]) -> Thought:
    return Thought(row["cut"], np.array(row["ids"], np.uint32), row["source"])


def _spans(rows: list[dict[str, Any]] | None) -> tuple[tuple[int, int], ...] | None:
    return None if rows is None else tuple((row["start"], row["stop"]) for row in rows)
