"""Text and Markdown files below a folder, one document each or cut into pieces."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlpt_data.documents import MAX_TEXT, Drop, SourceDocument
from rlpt_data.provenance import Source
from rlpt_data.sources import files

_READ = 1 << 20


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
            _check_utf8(path)
        except UnicodeDecodeError as error:
            yield Drop("not_utf8", str(path), str(error))
            continue
        if config.piece_bytes is None:
            yield SourceDocument(path.read_bytes().decode(), url=name, domain=domain)
            continue
        for number, piece in enumerate(_pieces(_paragraphs(path), config.piece_bytes)):
            if piece is None:
                detail = f"a paragraph of more than {MAX_TEXT} characters"
                yield Drop("too_large", f"{path}#{number}", detail)
            else:
                yield SourceDocument(piece, url=f"{name}#{number}", domain=domain)


def fingerprint(config: FolderConfig) -> str:
    return files.fingerprint(files.input_files(config.path, config.suffixes))


def _check_utf8(path: Path) -> None:
    """Raises UnicodeDecodeError. Before the first piece: a file is text as a whole or not at all."""
    with path.open(encoding="utf-8") as file:
        while file.read(_READ):
            pass


def _paragraphs(path: Path) -> Iterator[str | None]:
    """What stands between empty lines; None for what is too long to be held."""
    rest, too_long = "", False
    with path.open(encoding="utf-8", newline="") as file:
        while read := file.read(_READ):
            *whole, rest = (rest + read).split("\n\n")
            for paragraph in whole:
                yield None if too_long or len(paragraph) > MAX_TEXT else paragraph
                too_long = False
            # Its last character may be half of an empty line.
            if len(rest) > MAX_TEXT + 1:
                too_long, rest = True, rest[-1:]
    yield None if too_long or len(rest) > MAX_TEXT else rest


def _pieces(paragraphs: Iterable[str | None], piece_bytes: int) -> Iterator[str | None]:
    """Whole paragraphs, gathered until a piece is long enough; None for one that is too long."""
    gathered: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if paragraph is None:
            yield None
            continue
        gathered.append(paragraph)
        size += len(paragraph.encode()) + 2
        if size >= piece_bytes:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)
