"""Stages that choose documents by where they are from and what language they are in.

Lists and models are local files that the configuration names; nothing is ever downloaded.
"""

import functools
import importlib.util
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.filters import drop
from rlpt_data.manifest import digest_file
from rlpt_data.sources import files
from rlpt_data.strict import Grown, Strict, UserError

Stage = Callable[[SourceDocument], SourceDocument | Drop]


class UrlBlockListConfig(Grown):
    """Drop documents from listed hosts, hosts below them, and listed URLs."""

    LATER: ClassVar[tuple[str, ...]] = ("bundled",)
    kind: Literal["url-blocklist"]
    path: Path | None = None
    """A file of lines, plain or compressed: a host, a URL, or a # comment."""
    bundled: Literal["ut1"] | None = None
    """ut1: also the list for adults of Toulouse's university, 4.6 million hosts, which datatrove
    brings along and FineWeb was made with. Half a gigabyte in every worker."""

    @model_validator(mode="after")
    def _lists_something(self) -> "UrlBlockListConfig":
        if self.path is None and self.bundled is None:
            raise ValueError("[stages] url-blocklist: no list; give path, or bundled = 'ut1'")
        return self

    def resources(self) -> dict[str, str]:
        given = {"url-blocklist": _hash(self.path, "url-blocklist")} if self.path else {}
        return given | ({"url-blocklist-ut1": digest_file(_archive())} if self.bundled else {})

    def build(self) -> Stage:
        listed = frozenset(_lines(self.path)) if self.path else frozenset()
        bundled = _ut1() if self.bundled else frozenset()

        def stage(document: SourceDocument) -> SourceDocument | Drop:
            names = _names(document.url or "")
            found = next((name for name in names if name in listed or name in bundled), None)
            return document if found is None else drop(document, "blocked_url", found)

        return stage


def _lines(path: Path) -> list[str]:
    found = [item for item in files.lines(path) if not isinstance(item, Drop)]
    texts = [line.decode(errors="replace").strip().lower() for _, line in found]
    return [text.rstrip("/") for text in texts if text and not text.startswith("#")]


def _archive() -> Path:
    """Of datatrove's lists; its own filter would fetch a list of suffixes to read them."""
    spec = importlib.util.find_spec("datatrove")
    if spec is None or spec.origin is None:
        raise UserError(
            "[stages] url-blocklist: ut1 comes with datatrove; pip install 'rlpt[data]'"
        )
    return next(Path(spec.origin).parent.glob("assets/url_filterblacklists*.tar.gz"))


@functools.cache
def _ut1() -> frozenset[str]:
    """Read once in a process: it takes seconds."""
    with tarfile.open(_archive()) as archive:
        members = [archive.extractfile(member) for member in archive if member.isfile()]
        lines = (line for member in members if member for line in member)
        return frozenset(line.decode(errors="replace").strip().lower() for line in lines)


def _names(url: str) -> list[str]:
    """What of a URL can be listed: itself with and without scheme, its host and all above it."""
    try:
        parts = urlsplit(url.lower())
        host = parts.hostname or ""
    except ValueError:
        return [url.lower()]
    labels = host.split(".")
    above = [".".join(labels[at:]) for at in range(len(labels))]
    plain = url.lower().rstrip("/")
    return [plain, plain.partition("://")[2], *above]


class LanguageConfig(Strict):
    """Keep documents in some languages: those the source names, else those a detector finds."""

    kind: Literal["language"]
    languages: tuple[str, ...] = Field(min_length=1)
    """ISO 639-1, as en, or what the source calls them. There is no default: a corpus is in the
    languages that somebody chose."""
    model: Path | None = None
    """A fastText model (lid.176.bin); None: resiliparse's detector, which needs no file."""
    min_score: float = Field(default=0.65, ge=0.0, le=1.0)
    """Of a fastText model: a document whose language is less sure is dropped."""
    max_distance: int = Field(default=1200, ge=0)
    """Of resiliparse: a document farther from every known language is dropped."""

    def resources(self) -> dict[str, str]:
        return {"language": _hash(self.model, "language")} if self.model else {}

    def build(self) -> Stage:
        detect = (
            _fasttext(self.model, self.min_score)
            if self.model
            else resiliparse_detector(self.max_distance)
        )

        def stage(document: SourceDocument) -> SourceDocument | Drop:
            language = document.language or detect(document.text)
            if language in self.languages:
                return document
            return drop(document, "language", f"{language}: {document.text[:120]}")

        return stage


def resiliparse_detector(max_distance: int) -> Callable[[str], str]:
    """text -> its language as ISO 639-1, or unknown. Raises UserError without resiliparse."""
    try:
        from resiliparse.parse.lang import (
            detect_fast,  # pyright: ignore[reportMissingModuleSource]  # compiled
        )
    except ImportError as error:
        raise UserError("[stages] language needs resiliparse; pip install 'rlpt[data]'") from error
    return lambda text: detect_fast(text, cutoff=max_distance)[0]


def _fasttext(model: Path, min_score: float) -> Callable[[str], str]:
    try:
        import fasttext  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "[stages] language: a model needs fasttext; pip install fasttext-predict, or leave "
            "model out"
        ) from error
    try:
        loaded = fasttext.load_model(str(model))
    except ValueError as error:
        raise UserError(f"[stages] language: {error}; give a fastText model") from error

    def detect(text: str) -> str:
        labels, scores = loaded.predict(text.replace("\n", " "))
        if not labels:
            return "unknown"  # none of its words or parts of words
        name = labels[0].removeprefix("__label__")
        return name if scores[0] >= min_score else f"unsure ({name})"

    return detect


def _hash(path: Path, stage: str) -> str:
    if not path.is_file():
        raise UserError(f"[stages] {stage}: {path}: no such file; correct the path")
    return digest_file(path)
