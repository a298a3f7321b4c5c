"""Rows of Parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.provenance import Source
from rlpt_data.sources import files
from rlpt_data.sources.records import Fields, document
from rlpt_data.sources.units import Unit, of_files
from rlpt_data.strict import UserError, nearest

SUFFIXES = (".parquet",)
_ROWS = 64
"""At once: a dictionary makes a long text out of every few bytes."""


class ParquetConfig(Source):
    kind: Literal["parquet"]
    path: Path
    """A file, or a folder of .parquet files."""
    fields: Fields = Fields()


def documents(config: ParquetConfig) -> Iterator[SourceDocument | Drop]:
    """Reads only the columns it needs. Raises UserError when the text column is not there."""
    for unit in units(config):
        yield from read(config, unit)


def units(config: ParquetConfig) -> list[Unit]:
    return of_files(config.path, files.input_files(config.path, SUFFIXES))


def read(config: ParquetConfig, unit: Unit) -> Iterator[SourceDocument | Drop]:
    """The rows of one file."""
    assert unit.path is not None
    yield from _rows(unit.path, config.fields)


def fingerprint(config: ParquetConfig) -> str:
    return files.fingerprint(files.input_files(config.path, SUFFIXES))


def _rows(path: Path, fields: Fields) -> Iterator[SourceDocument | Drop]:
    number, left = 0, files.most_bytes(path)
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, fields)
            for batch in file.iter_batches(_ROWS, columns=columns):
                for row in _listed(batch):
                    left -= sum(len(str(value)) for value in row.values())
                    if left < 0:
                        raise OSError(f"inflates to more than {files.most_bytes(path)} bytes")
                    yield document(row, fields, f"{path}:{number}")
                    number += 1
    # UnicodeDecodeError: of a text or a column's name.
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        yield Drop("damaged_file", f"{path}:{number}", str(error))


def _listed(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Raises OSError for values that are none, whatever they are of: times beyond the calendar, unknown zones."""
    try:
        return batch.to_pylist()
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _columns(path: Path, present: list[str], fields: Fields) -> list[str]:
    if fields.text not in present:
        remedy = nearest(fields.text, present)
        raise UserError(f"{path}: no column {fields.text!r} ([source.fields] text); {remedy}")
    return [name for name in fields.names() if name in present]
