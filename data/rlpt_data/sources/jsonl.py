"""One JSON object per line, plain or compressed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.provenance import Source
from rlpt_data.sources import files
from rlpt_data.sources.records import Fields, document
from rlpt_data.sources.units import Unit, of_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class JsonlConfig(Source):
    kind: Literal["jsonl"]
    path: Path
    """A file, or a folder of .jsonl, .jsonl.gz and .jsonl.zst files."""
    fields: Fields = Fields()


def documents(config: JsonlConfig) -> Iterator[SourceDocument | Drop]:
    """A line that is not JSON is a drop that names its file and line."""
    for unit in units(config):
        yield from read(config, unit)


def units(config: JsonlConfig) -> list[Unit]:
    return of_files(config.path, files.input_files(config.path, SUFFIXES))


def read(config: JsonlConfig, unit: Unit) -> Iterator[SourceDocument | Drop]:
    """The lines of one file."""
    assert unit.path is not None
    for item in files.lines(unit.path):
        if isinstance(item, Drop):
            yield item
        elif item[1].strip():
            yield _line(item[1], config.fields, f"{unit.path}:{item[0]}")


def fingerprint(config: JsonlConfig) -> str:
    return files.fingerprint(files.input_files(config.path, SUFFIXES))


def _line(line: bytes, fields: Fields, where: str) -> SourceDocument | Drop:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Drop("bad_json", where, str(error))
    return document(row, fields, where)
