"""The manifest of a shard folder: what is in it, where it came from, and its content address.

``hash`` covers everything that determines the bytes of the rows: configuration, input, tokenizer
and the checksum of every file. ``created_by`` names the versions that wrote it and is left out,
because equal bytes are equal data whoever wrote them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlpt_data.strict import Strict, UserError, json_of, parse

NAME = "manifest.json"
SPLITS = ("train", "dev", "test")
FORMAT_VERSION = 1


class Counts(Strict):
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of text."""


NOTHING = Counts(documents=0, tokens=0, bytes=0)


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of each count."""
    tables = [each.model_dump() for each in counts]
    return Counts(**{name: sum(table[name] for table in tables) for name in Counts.model_fields})


class FileEntry(Strict):
    path: str
    """Relative to the folder, with forward slashes."""
    rows: int
    bytes: Annotated[int, Field(ge=0)]
    blake2b: str
    """128 bits, hex."""

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        """The manifest may be somebody else's. Two colons: fsspec would go on to another address."""
        if path.startswith("/") or ".." in path.split("/") or "::" in path:
            raise ValueError(f"path = {path!r} leads out of the folder; put its own manifest there")
        return path


class Manifest(Strict):
    version: Literal[1]
    hash: str
    """Content address of the folder, 128 bits, hex."""
    tokenizer_hash: str | None
    """blake2b-128 of tokenizer.json as it lies in the folder; None: there is none."""
    vocab_size: int
    split_by: Literal["domain", "document", "source"]
    """The unit of the split; also the unit a bootstrap must resample."""
    counts: dict[str, Counts]
    drops: dict[str, int]
    """Documents left out, by reason; samples lie in dropped/<reason>.jsonl."""
    stages: tuple[dict[str, Any], ...] | None = None
    """What each stage let through and left out, in order; None: written before stages were counted."""
    sources: dict[str, Counts] | None = None
    """Of every source of a mixture, over all splits; None: there is one source, without a name."""
    files: tuple[FileEntry, ...]
    config: dict[str, Any]
    input_hash: str | None
    """Fingerprint of the corpus; None: the source cannot tell."""
    created_by: dict[str, str]

    def content_hash(self) -> str:
        """The hash these contents should have."""
        covered = {k: v for k, v in self.to_json().items() if k not in ("hash", "created_by")}
        return digest(json.dumps(covered, sort_keys=True).encode())

    def to_json(self) -> dict[str, Any]:
        """As on disk. Fields that older folders lack are left out where they say nothing."""
        table = self.model_dump(mode="json")
        later = ("stages", "sources")
        return {key: value for key, value in table.items() if key not in later or value is not None}


def digest(data: bytes) -> str:
    """blake2b with 128 bits, as hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """blake2b-128 of a file's bytes, read in pieces."""
    running = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            running.update(piece)
    return running.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Parse the manifest of ``folder``. Raises UserError when it is absent or damaged."""
    path = folder / NAME
    if not path.is_file():
        what = "no manifest here" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; write the shards with `rlpt data prepare`")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest that was read from ``where``. Raises UserError when it is damaged."""
    try:
        table = json_of(data)
    except ValueError as error:
        raise UserError(f"{where}: damaged: {error}; run `rlpt data prepare` again") from error
    if not isinstance(table, dict) or table.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{where}: not a manifest of format version {FORMAT_VERSION}; run `rlpt data prepare`"
        )
    return parse(Manifest, table, where)
