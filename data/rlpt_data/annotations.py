"""What a proxy model thinks of every token, beside the shards; cuts as a query over it.

    annotations/<proxy>/annotation.json   what was computed, by which model, from which shard files
    annotations/<proxy>/train/00000.arrow one row a document: entropy, loss, short_loss, rank

``<proxy>`` is the hash of the model and of its settings; files never change once they are there. The
value at position t is that of the model's prediction of token t. Position 0 has none and is NaN.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, UInt32

from rlpt_data.manifest import digest, digest_file
from rlpt_data.queries import AnnotatedCuts
from rlpt_data.strict import Strict, UserError, json_of, parse

FOLDER = "annotations"
NAME = "annotation.json"
_F32 = pa.list_(pa.field("item", pa.float32(), nullable=False))
SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("entropy", _F32, nullable=False),
        pa.field("loss", _F32, nullable=False),
        pa.field("short_loss", _F32, nullable=False),
        pa.field("rank", pa.list_(pa.field("item", pa.uint32(), nullable=False)), nullable=False),
    ]
)


class AnnotationFacts(Strict):
    """The contents of annotation.json."""

    proxy: str
    """Hash of weights, configuration and settings."""
    model: str
    """Where it came from: a name, no identity."""
    window: int
    """Longest context the proxy had."""
    short_window: int
    """Longest context for ``short_loss``."""
    files: dict[str, str]
    """Shard file -> its checksum when it was annotated."""
    sidecars: dict[str, str]
    """Sidecar file -> its checksum."""


@dataclass(frozen=True, eq=False)
class Annotation:
    """Of one document, in nats; ``rank`` 0 is the likeliest token."""

    document_id: str
    entropy: Float32[np.ndarray, " T"]
    loss: Float32[np.ndarray, " T"]
    """-log p of the token that stands there, with all the context the proxy takes."""
    short_loss: Float32[np.ndarray, " T"]
    """The same with a short context: where it is high and ``loss`` is low, the text before tells."""
    rank: UInt32[np.ndarray, " T"]


def ahead(values: Float32[np.ndarray, " T"], horizon: int) -> Float32[np.ndarray, " T"]:
    """Mean of ``horizon`` values from each position on; NaN where so many do not follow."""
    found = np.full(len(values), np.nan, np.float32)
    if len(values) >= horizon:
        sums = np.lib.stride_tricks.sliding_window_view(values, horizon)
        found[: len(sums)] = sums.mean(axis=1, dtype=np.float64)
    return found


def chosen(
    annotation: Annotation,
    allowed: Int64[np.ndarray, " K"],
    query: AnnotatedCuts,
    tier: tuple[float, float] | None,
) -> Int64[np.ndarray, " C"]:
    """Those of the ``allowed`` positions that a query selects; ``tier``: bounds of the loss."""
    entropy = ahead(annotation.entropy, query.horizon)[allowed]
    loss = ahead(annotation.loss, query.horizon)[allowed]
    short = ahead(annotation.short_loss, query.horizon)[allowed]
    fits = np.isfinite(loss)
    for value, least, most in (
        (entropy, query.min_entropy, query.max_entropy),
        (loss, query.min_loss, query.max_loss),
        (short, query.min_short_loss, None),
        (loss, *(tier or (None, None))),
    ):
        fits &= (least is None or value >= least) & (most is None or value <= most)
    left = np.flatnonzero(fits)
    if query.top_share is not None and len(left):
        count = int(np.ceil(query.top_share * len(left)))
        left = np.sort(left[np.argsort(-entropy[left], kind="stable")[:count]])
    return _spaced(allowed[left], query.min_spacing)


def _spaced(cuts: np.ndarray, least: int) -> np.ndarray:
    kept: list[int] = []
    for cut in cuts.tolist():
        if not kept or cut - kept[-1] >= least:
            kept.append(cut)
    return np.array(kept, np.int64)


def proxy_hash(paths: list[Path], settings: dict[str, int]) -> str:
    """Of the files of a model and what it is asked."""
    files = [f"{path.name}={digest_file(path)}" for path in paths]
    return digest(f"{files} {sorted(settings.items())}".encode())


class SidecarWriter:
    """Writes one sidecar; it appears under its name when the context ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> "SidecarWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        return self

    def add(self, rows: list[Annotation]) -> None:
        columns = [
            pa.array([getattr(row, field.name) for row in rows], type=field.type)
            for field in SCHEMA
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            self._partial.rename(self._path)


def write_facts(folder: Path, facts: AnnotationFacts) -> None:
    """Last, by a rename: a proxy's folder with it is complete."""
    partial = folder / f"{NAME}.{os.getpid()}"
    partial.write_text(json.dumps(facts.model_dump(mode="json"), indent=1))
    partial.rename(folder / NAME)


def find(shards: Path, proxy: str, files: dict[str, str]) -> tuple[Path, AnnotationFacts]:
    """The complete annotation of a shard folder by a proxy. Raises UserError.

    ``files`` are the folder's shard files with their checksums: an annotation of others is refused.
    """
    root = shards / FOLDER
    found = [path.parent for path in sorted(root.glob(f"{proxy}*/{NAME}"))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{root}: {names} match proxy = {proxy!r}, and it must be one; annotate the shards with "
            "`rlpt data annotate`, or give more of the hash"
        )
    facts = _facts(found[0] / NAME)
    if facts.files != files:
        raise UserError(f"{found[0]}: made for other shards; run `rlpt data annotate` again")
    return found[0], facts


def _facts(path: Path) -> AnnotationFacts:
    try:
        table = json_of(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; run `rlpt data annotate` again") from error
    return parse(AnnotationFacts, table, str(path))


def read(path: Path) -> Iterator[Annotation]:
    """The rows of one sidecar, in the order of its shard's documents. Raises UserError where it is damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(SCHEMA):
            raise ValueError("other columns than this version's")
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            for row in range(batch.num_rows):
                yield _annotation(batch, row)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged: {error}; run `rlpt data annotate` again") from error


def _annotation(batch: pa.RecordBatch, row: int) -> Annotation:
    def column(name: str) -> Any:
        return batch.column(name)[row].values.to_numpy(zero_copy_only=True)

    values = {name: column(name) for name in ("entropy", "loss", "short_loss", "rank")}
    if len({len(each) for each in values.values()}) > 1:
        raise ValueError("columns of different lengths")
    document_id = batch.column("document_id")[row].as_py()
    if document_id is None:
        raise ValueError(f"row {row} is of no document")
    return Annotation(document_id=document_id, **values)


def check(folder: Path, facts: AnnotationFacts) -> None:
    """Every sidecar has the checksum it was written with. Raises UserError."""
    for name, expected in facts.sidecars.items():
        if not (folder / name).is_file() or digest_file(folder / name) != expected:
            raise UserError(f"{folder / name}: not as written; run `rlpt data annotate` again")
