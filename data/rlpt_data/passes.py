"""The three passes over a corpus, as tasks for workers: read, clean, encode.

A task gets a job of names and numbers, writes its files beside their final names, flushes, renames,
and gives back which files it wrote and what it counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpt_data import sources, stages
from rlpt_data.cuts import CutsConfig
from rlpt_data.documents import SourceDocument
from rlpt_data.filters import ALWAYS, admitted, passed
from rlpt_data.manifest import NOTHING, Counts, total
from rlpt_data.rows import RowMaker
from rlpt_data.shards import Document
from rlpt_data.sources.units import Unit
from rlpt_data.split import SplitConfig
from rlpt_data.store import Store, StoreWriter, padded, store_files, writer_name
from rlpt_data.tally import Tally
from rlpt_data.tokenizer import PlainTokenizer
from rlpt_data.work import Done
from rlpt_data.writing import ShardWriter, counts_of

BATCH_DOCUMENTS, BATCH_BYTES = 256, 16 << 20


@dataclass(frozen=True)
class ReadJob:
    """Read one unit: source -> extraction -> the stages before duplicates."""

    unit: str
    target: Path
    source: Any
    part: Unit
    stages: tuple[Any, ...]
    split: SplitConfig
    max_items: int | None


def read(job: ReadJob) -> Done:
    """Documents of a unit into a store, with signatures where near-duplicates are looked for."""
    tally = Tally()
    near = stages.near_duplicates(job.stages)
    chain = [*ALWAYS, *stages.built(stages.before(job.stages))]
    items = sources.read(job.source, job.part)
    count = 0
    with StoreWriter(job.target, job.split) as store:
        for document in admitted(_first(items, job.max_items), chain, tally):
            store.add(document, near.signature(document.text) if near else None)
            count += 1
    files = tuple(store_files(job.target))
    return Done(files, tally, documents=count)


def _first(items: Iterator[Any], count: int | None) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number == count:
            return
        yield item


@dataclass(frozen=True)
class CleanJob:
    """The stages after duplicates, for the documents of one unit that stay."""

    unit: str
    target: Path
    read: Path
    kept: Path
    """A .npy file of rows."""
    stages: tuple[Any, ...]
    split: SplitConfig


def save_rows(path: Path, rows: np.ndarray) -> None:
    """The rows of a store that stay, for a ``CleanJob``."""
    np.save(path, rows)


def clean(job: CleanJob) -> Done:
    """From one store into another."""
    tally = Tally()
    chain = stages.built(stages.after(job.stages))
    with StoreWriter(job.target, job.split) as store:
        for read in Store(job.read).documents(np.load(job.kept).tolist()):
            for document in passed(read, chain, tally):
                store.add(document)
    return Done(tuple(store_files(job.target)), tally)


@dataclass(frozen=True)
class EncodeJob:
    """One shard: documents in their final order -> tokens, cuts, an Arrow file."""

    unit: str
    """Its name in the folder, as train/00000.arrow."""
    target: Path
    stores: tuple[Path, ...]
    order: Path
    """A .npy file: (documents, 3), the number of the store, the row in it, the limit of cuts."""
    start: int
    stop: int
    tokenizer: Path
    cuts: CutsConfig
    seed: int
    owners: tuple[str, ...]
    """The name of every store's source; "" where there is one source."""


def encode(job: EncodeJob) -> Done:
    """Write a shard row by row; what cannot be encoded or cut is a drop."""
    tally = Tally()
    tokenizer = PlainTokenizer.cached(job.tokenizer)
    maker = RowMaker(tokenizer, job.cuts, job.seed)
    places = np.load(job.order, mmap_mode="r")[job.start : job.stop]
    partial = job.target.with_name(f"{job.target.name}.{writer_name()}")
    stores = [Store(path) for path in job.stores]
    by_source: dict[str, Counts] = {}
    with ShardWriter(partial) as writer:
        at = 0
        for batch in batches(_documents(stores, places)):
            here = places[at : at + len(batch)].tolist()
            at += len(batch)
            made = maker.rows(batch, [limit for _, _, limit in here])
            for row, (number, _, _) in zip(made, here, strict=True):
                tally.enter(stages.ENCODE)
                if isinstance(row, Document):
                    writer.add(row)
                    owner = job.owners[number]
                    by_source[owner] = total([by_source.get(owner, NOTHING), counts_of(row)])
                else:
                    tally.drop(stages.ENCODE, row)
    facts = {"sources": {name: counts.model_dump() for name, counts in by_source.items()}}
    if not by_source:
        partial.unlink()
        return Done((), tally, facts)
    partial.rename(job.target)
    return Done((job.target,), tally, facts, documents=writer.counts.documents)


def _documents(stores: list[Store], places: np.ndarray) -> Iterator[tuple[str, SourceDocument]]:
    for number, row, _ in places.tolist():
        store = stores[number]
        yield padded(store.index["id"][row]).hex(), store[row]


def batches(
    pairs: Iterable[tuple[str, SourceDocument]],
) -> Iterator[list[tuple[str, SourceDocument]]]:
    """As many as fit: few when they are long, so that memory does not grow with a document."""
    batch: list[tuple[str, SourceDocument]] = []
    size = 0
    for key, document in pairs:
        batch.append((key, document))
        size += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
