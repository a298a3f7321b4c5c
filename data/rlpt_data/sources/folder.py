"""Text and Markdown files below a folder, one document each or cut into pieces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlpt_data.documents import MAX_TEXT, Drop, SourceDocument
from rlpt_data.provenance import Source
from rlpt_data.sources import files


class FolderConfig(Source):
    kind: Literal["folder"]
    path: Path
    """A folder, searched at every depth, or one file."""
    suffixes: tuple[str, ...] = (".txt", ".md")
    piece_bytes: int | None = Field(default=None, ge=1)
    """Cut files into documents of about this many bytes at ends of paragraphs; None: whole files.
    Pieces of one file can fall on both sides of the split."""


def documents(config: FolderConfig) -> Iterator[SourceDocument | Drop]:
    """The URL of a document is its path below the folder, and #n for a piece."""
    root = config.path if config.path.is_dir() else config.path.parent
    for path in files.input_files(config.path, config.suffixes):
        name = path.relative_to(root).as_posix()
        domain = name.split("/")[0] if "/" in name else None
        size = path.stat().st_size
        if config.piece_bytes is None and size > MAX_TEXT:
            yield Drop("too_large", str(path), f"a file of {size} bytes; set piece_bytes")
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            yield Drop("not_utf8", str(path), str(error))
            continue
        if config.piece_bytes is None:
            yield SourceDocument(text, url=name, domain=domain)
            continue
        for number, piece in enumerate(_pieces(text, config.piece_bytes)):
            yield SourceDocument(piece, url=f"{name}#{number}", domain=domain)


def fingerprint(config: FolderConfig) -> str:
    return files.fingerprint(files.input_files(config.path, config.suffixes))


def _pieces(text: str, piece_bytes: int) -> Iterator[str]:
    """Whole paragraphs, gathered until a piece is long enough."""
    gathered: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= piece_bytes:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)
