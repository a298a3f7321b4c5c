"""Evaluation sets -> an index of word n-grams; documents that hold an evaluation item are found by it.

Three rules, on lower-case words without punctuation: a run of 13 words of an item; half of an item's
runs of 8 words; a short item as a whole. Every document that one of them meets is left out.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.filters import drop
from rlpt_data.manifest import digest
from rlpt_data.minhash import ngrams, words
from rlpt_data.progress import shown
from rlpt_data.strict import Strict, UserError, json_of

LONG, SHORT = 13, 8
LEAST_WORDS = 5
"""An item of fewer words stands in half the web: it is not looked for."""
COVERAGE = 0.5
CONTAMINATED = "contaminated"
FILE = "contamination.npz"
"""The index as it lies in a shard folder."""


class EvaluationSet(Strict):
    name: str
    path: Path
    """JSON lines (plain, gzip, zstd) or Parquet."""
    fields: tuple[str, ...]
    """Their texts, one after the other, are the item."""


class IndexConfig(Strict):
    """What `rlpt data index` reads from its TOML."""

    out: Path
    """The .npz file to write."""
    sets: tuple[EvaluationSet, ...] = Field(min_length=1)

    @field_validator("sets", mode="after")
    @classmethod
    def _by_different_names(cls, given: tuple[EvaluationSet, ...]) -> tuple[EvaluationSet, ...]:
        names = [each.name for each in given]
        if len(set(names)) < len(names):
            raise ValueError(f"names of [[sets]] must differ; got {', '.join(names)}")
        return given


class DecontaminateConfig(Strict):
    """Drop documents that hold an item of an evaluation set."""

    kind: Literal["decontaminate"]
    index: Path
    """Written by `rlpt data index`."""

    def resources(self) -> dict[str, str]:
        return {"decontaminate": digest(read_index_bytes(self.index))}

    def build(self) -> Callable[[SourceDocument], SourceDocument | Drop]:
        index = Index.from_bytes(read_index_bytes(self.index), str(self.index))

        def stage(document: SourceDocument) -> SourceDocument | Drop:
            hits = index.hits(document.text)
            detail = "\n".join(map(str, hits))
            return drop(document, CONTAMINATED, detail) if hits else document

        return stage


def read_index_bytes(path: Path) -> bytes:
    """Raises UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"[stages] index = {path}: no such file; write it with `rlpt data index`")
    return path.read_bytes()


@dataclass(frozen=True)
class Hit:
    """Which item a text holds, by which rule."""

    item: str
    """set#number"""
    rule: str
    words: str

    def __str__(self) -> str:
        return f"{self.item} by {self.rule}: {self.words}"


@dataclass(frozen=True)
class _Table:
    """(gram, item) pairs, sorted by gram."""

    grams: np.ndarray
    items: np.ndarray

    def found(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every occurrence of a gram of the table: its place in ``grams``, its item."""
        start = np.searchsorted(self.grams, grams, side="left")
        stop = np.searchsorted(self.grams, grams, side="right")
        hit = np.flatnonzero(stop > start)
        counts = (stop - start)[hit]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(hit, counts), self.items[np.repeat(start[hit], counts) + within]

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, np.ndarray]]) -> "_Table":
        rows = [(item, np.unique(grams)) for item, grams in pairs]
        grams = np.concatenate([g for _, g in rows]) if rows else np.zeros(0, np.uint64)
        items = np.repeat([item for item, _ in rows], [len(g) for _, g in rows]).astype(np.int64)
        order = np.lexsort((items, grams))
        return cls(grams[order], items[order])


class Index:
    """Finds evaluation items in texts."""

    def __init__(self, names: list[str], tables: Mapping[int, _Table], sizes: np.ndarray) -> None:
        self.names = names
        """Of every item."""
        self._tables = tables
        """0: the rule of coverage; n: runs of n words, any of which is a hit."""
        self._sizes = sizes
        """Distinct runs of 8 words of every item."""

    @classmethod
    def of(cls, items: Mapping[str, str]) -> "Index":
        """Of items by name. Those under LEAST_WORDS words cannot be found."""
        tokens = [words(text) for text in items.values()]
        long = [(n, ngrams(t, LONG)) for n, t in enumerate(tokens) if len(t) >= LONG]
        parts = {n: np.unique(ngrams(t, SHORT)) for n, t in enumerate(tokens) if len(t) >= LONG}
        tables = {LONG: _Table.of(long), 0: _Table.of(parts.items())}
        for size in range(LEAST_WORDS, LONG):
            whole = [(n, ngrams(t, size)) for n, t in enumerate(tokens) if len(t) == size]
            if whole:
                tables[size] = _Table.of(whole)
        sizes = np.array([len(parts.get(n, ())) for n in range(len(tokens))], np.int64)
        return cls(list(items), tables, sizes)

    def hit(self, text: str) -> Hit | None:
        """The first item found in a text, or None."""
        return next(iter(self.hits(text)), None)

    def hits(self, text: str) -> list[Hit]:
        """Every item found in a text, each once, by the first rule that meets it."""
        tokens = words(text)
        found: dict[int, Hit] = {}
        for size, table in sorted(self._tables.items(), reverse=True):
            if size and len(tokens) >= size:
                places, items = table.found(ngrams(tokens, size))
                rule = f"{size} words" if size == LONG else f"all its {size} words"
                for place, item in zip(places.tolist(), items.tolist(), strict=True):
                    if item not in found:
                        found[item] = self._hit(item, rule, tokens, place, size)
        covered = self._covered(tokens)
        return [*found.values(), *(hit for item, hit in covered.items() if item not in found)]

    def _covered(self, tokens: list[str]) -> dict[int, Hit]:
        """The items of which enough runs are there, the best covered first."""
        if len(tokens) < SHORT:
            return {}
        grams, first = np.unique(ngrams(tokens, SHORT), return_index=True)
        places, items = self._tables[0].found(grams)
        counts = np.bincount(items, minlength=len(self.names))
        share = counts / np.maximum(1, self._sizes)
        enough = np.flatnonzero(share >= COVERAGE) if len(items) else items
        found: dict[int, Hit] = {}
        for item in enough[np.argsort(-share[enough], kind="stable")].tolist():
            rule = f"{share[item]:.0%} of its runs of {SHORT} words"
            place = int(first[places[items == item]].min())
            found[item] = self._hit(item, rule, tokens, place, SHORT)
        return found

    def _hit(self, item: int, rule: str, tokens: list[str], place: int, size: int) -> Hit:
        return Hit(self.names[item], rule, " ".join(tokens[place : place + size]))

    def to_bytes(self) -> bytes:
        """A .npz file; equal indexes are equal bytes."""
        arrays = {
            "sizes": self._sizes,
            "names": np.frombuffer(json.dumps(self.names).encode(), "u1"),
        }
        for size, table in self._tables.items():
            arrays |= {f"grams{size}": table.grams, f"items{size}": table.items}
        file = io.BytesIO()
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Index":
        """Raises UserError when this is no index."""
        try:
            found = _arrays(data)
            numbers = [name.removeprefix("grams") for name in found if name.startswith("grams")]
            tables = {
                int(n): _Table(found.pop(f"grams{n}"), found.pop(f"items{n}")) for n in numbers
            }
            names = json_of(found["names"].tobytes())
            _check_index(names, tables, found["sizes"])
            return cls(names, tables, found["sizes"])
        except (
            ValueError,
            KeyError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
            NotImplementedError,
        ) as error:
            raise UserError(
                f"{where}: no index ({error}); write it with `rlpt data index`"
            ) from error


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a .npz, none of them larger than its own bytes. Raises as zipfile does, and ValueError."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                raise ValueError(f"{member.filename} is compressed")
            file = io.BytesIO(archive.read(member))
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{member.filename} is of another version")
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            values = file.read()
            if len(shape) != 1 or kind.hasobject or shape[0] * kind.itemsize != len(values):
                raise ValueError(f"{member.filename} is no list of numbers")
            found[member.filename.removesuffix(".npy")] = np.frombuffer(values, kind)
    return found


def _check_index(names: Any, tables: Mapping[int, _Table], sizes: np.ndarray) -> None:
    """Every item has a name and a size. Raises ValueError."""
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or sizes.dtype != np.int64 or len(sizes) != len(names) or 0 not in tables:
        raise ValueError("its names, sizes and tables are not of one index")
    for table in tables.values():
        kinds = (table.grams.dtype, table.items.dtype)
        if kinds != (np.uint64, np.int64) or len(table.grams) != len(table.items):
            raise ValueError("a table is not of pairs")
        if len(table.items) and not 0 <= table.items.min() <= table.items.max() < len(names):
            raise ValueError("a table names an item that there is not")


def build_index(config: IndexConfig) -> dict[str, Any]:
    """Write the index file; how many items of every set it can find."""
    items: dict[str, str] = {}
    report: dict[str, Any] = {}
    for chosen in config.sets:
        found = dict(shown(_items(chosen), f"index {chosen.name}", None, unit="items"))
        short = sum(len(words(text)) < LEAST_WORDS for text in found.values())
        report[chosen.name] = {"items": len(found), "too_short": short}
        items |= found
    config.out.parent.mkdir(parents=True, exist_ok=True)
    data = Index.of(items).to_bytes()
    partial = config.out.with_name(f"{config.out.name}.partial")
    partial.write_bytes(data)
    partial.rename(config.out)
    return {"out": str(config.out), "blake2b": digest(data), "sets": report}


def _items(chosen: EvaluationSet) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(_rows(chosen)):
        missing = [name for name in chosen.fields if not isinstance(row.get(name), str)]
        if missing:
            raise UserError(
                f"{chosen.path}, item {number}: no text in {', '.join(missing)}; "
                f"its fields are {', '.join(row)}"
            )
        yield f"{chosen.name}#{number}", "\n".join(row[name] for name in chosen.fields)


def _rows(chosen: EvaluationSet) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rlpt_data.sources import files

    if not chosen.path.is_file():
        raise UserError(f"[sets] path = {chosen.path}: no such file; correct the path")
    if chosen.path.suffix == ".parquet":
        try:
            yield from pq.read_table(chosen.path).to_pylist()
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise UserError(f"{chosen.path}: {error}; an index needs every item") from error
        return
    for item in files.lines(chosen.path):
        if isinstance(item, Drop):
            raise UserError(f"{item.where}: {item.detail}; an index needs every item")
        if item[1].strip():
            yield _object(item[1], f"{chosen.path}:{item[0]}")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json_of(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}; an index needs every item") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object; an index needs every item")
    return row
