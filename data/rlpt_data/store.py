"""Documents on disk between two passes: one file of records, one array that says where each lies.

Read forwards or by position, always in constant memory: nothing is mapped, so a process holds what
it works on and no more.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rlpt_data.documents import SourceDocument, SourceThought
from rlpt_data.manifest import SPLITS
from rlpt_data.split import SplitConfig, domain_of, side_of

INDEX = np.dtype(
    [
        ("id", "S16"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("text_bytes", "<u4"),
        ("domain", "<u8"),
        ("given", "?"),
        ("by_domain", "u1"),
        ("by_document", "u1"),
    ]
)
"""``id`` is blake2b-128 of the text, ``domain`` a hash of its name (0: unknown); ``by_domain`` and
``by_document`` are the sides that the document has with either unit of the split, as indices of
SPLITS, and ``given`` says that the source decided."""
_SUFFIXES = (".docs", ".index.npy", ".signatures.npy")


def text_id(text: str) -> bytes:
    """blake2b-128 of the text's UTF-8 bytes; a lone surrogate, which has none, counts as a ?."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def padded(key: bytes) -> bytes:
    """A key out of an array, whose trailing NULs numpy takes off."""
    return key.ljust(16, b"\0")


def name_hash(name: str) -> int:
    """64 bits of a domain's name; 0 stands for the unknown one."""
    data = name.encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") if name else 0


class StoreWriter:
    """Writes ``path`` + suffixes; the files appear under their names when the context ends well."""

    def __init__(self, path: Path, split: SplitConfig) -> None:
        self._path = path
        self._split = split
        self._file = _partial(path, ".docs").open("wb")
        self._rows: list[tuple[Any, ...]] = []
        self._signatures: list[np.ndarray] = []
        self._offset = 0

    def add(self, document: SourceDocument, signature: np.ndarray | None = None) -> None:
        record = json.dumps(_table(document), ensure_ascii=False).encode()
        self._file.write(record)
        key = text_id(document.text)
        sides = [
            SPLITS.index(side_of(key.hex(), document, unit, self._split))
            for unit in ("domain", "document")
        ]
        size = len(document.text.encode())
        domain = name_hash(domain_of(document))
        where = (self._offset, len(record))
        self._rows.append((key, *where, size, domain, document.split is not None, *sides))
        self._offset += len(record)
        if signature is not None:
            self._signatures.append(signature)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is not None:
                return
            flush(self._file)
        _save(_partial(self._path, ".index.npy"), np.array(self._rows, INDEX))
        if self._signatures:
            _save(_partial(self._path, ".signatures.npy"), np.stack(self._signatures))
        for path in store_files(self._path, partial=True):
            path.rename(path.with_name(path.name.removesuffix(f".{writer_name()}")))


class Store:
    """Reads what a ``StoreWriter`` wrote. Holds no file open: a corpus has thousands of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = np.load(path.with_name(path.name + ".index.npy"))
        self._docs = path.with_name(path.name + ".docs")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> SourceDocument:
        return next(self.documents([row]))

    def documents(self, rows: Iterable[int]) -> Iterator[SourceDocument]:
        """The documents in these rows, in this order."""
        with self._docs.open("rb") as file:
            for row in rows:
                entry = self.index[row]
                file.seek(int(entry["offset"]))
                yield _document(json.loads(file.read(int(entry["size"]))))

    def signatures(self) -> np.ndarray | None:
        """(documents, bands) uint64, or None where none were taken."""
        path = self.path.with_name(self.path.name + ".signatures.npy")
        return np.load(path, mmap_mode="r") if path.exists() else None


def store_files(path: Path, partial: bool = False) -> list[Path]:
    """The files of a store that exist."""
    end = f".{writer_name()}" if partial else ""
    paths = [path.with_name(path.name + suffix + end) for suffix in _SUFFIXES]
    return [path for path in paths if path.exists()]


def flush(file: Any) -> None:
    """To the disk itself: a rename must not overtake the data."""
    file.flush()
    os.fsync(file.fileno())


def writer_name() -> str:
    """Of this process among those of all machines: what it has not finished ends in it."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _partial(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}{suffix}.{writer_name()}")


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        flush(file)


def _table(document: SourceDocument) -> dict[str, Any]:
    table = asdict(document)
    empty = [key for key in ("cuts", "thoughts") if not table[key]]
    return {key: v for key, v in table.items() if v is not None and key not in empty}


def _document(table: dict[str, Any]) -> SourceDocument:
    if "thoughts" in table:
        table["thoughts"] = tuple(SourceThought(**thought) for thought in table["thoughts"])
    if "cuts" in table:
        table["cuts"] = tuple(table["cuts"])
    if "target_spans" in table:
        table["target_spans"] = tuple((start, stop) for start, stop in table["target_spans"])
    return SourceDocument(**table)
