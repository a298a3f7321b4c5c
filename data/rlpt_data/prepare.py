"""Corpus -> shards, top to bottom.

read -> filter -> split -> tokenizer -> encode and cut -> order -> write. The same corpus and
configuration give the same bytes, whatever the order of the input: documents are named by their
content and sorted by a hash, which is also the one global shuffle.
"""

import itertools
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pyarrow
import tokenizers
from pydantic import Field
from rich.console import Console
from rich.progress import track

from rlpt_data import filters, sources
from rlpt_data.cuts import CutsConfig
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.inspection import inspect, render_inspect
from rlpt_data.manifest import NAME, SPLITS, Manifest, digest, read_manifest
from rlpt_data.rows import RowMaker
from rlpt_data.shards import Document, ShardFolder
from rlpt_data.split import SplitConfig, assign, check_sides
from rlpt_data.strict import Strict, UserError
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs
from rlpt_data.writing import Facts, write_folder

__all__ = ["PrepareConfig", "inspect", "prepare", "render_inspect"]

RECIPE = 1
"""Raised whenever the same corpus and configuration would give other bytes than before."""
BATCH = 256
MAX_LOSSY_SHARE = 0.01
_Item = TypeVar("_Item")
_STDERR = Console(stderr=True)


class TokenizerFile(Strict):
    kind: Literal["file"]
    path: Path
    """A tokenizer.json, or a Hugging Face folder that holds one."""


class TokenizerTrained(Strict):
    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=4096, ge=257)
    """Bytes and merges together; trained on the train split."""


class TokenizerBytes(Strict):
    kind: Literal["byte"]


class PrepareConfig(Strict):
    """What `rlpt data prepare` reads from its TOML."""

    out: Path
    """The shard folder to write."""
    source: sources.SourceConfig
    tokenizer: Annotated[
        TokenizerFile | TokenizerTrained | TokenizerBytes, Field(discriminator="kind")
    ] = TokenizerTrained()
    cuts: CutsConfig = CutsConfig()
    split: SplitConfig = SplitConfig()
    seed: int = 0
    """Of the order of the documents and of the random cuts."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read no more than this many; None: all."""
    shard_bytes: int = Field(default=256 << 20, ge=1)
    """A file is closed once it holds about this much."""


def prepare(config: PrepareConfig, overwrite: bool = False, progress: bool = True) -> Manifest:
    """Write the shard folder ``config.out`` and return its manifest.

    A folder that already holds exactly this is left alone and said to be so. Raises UserError when
    it holds something else and ``overwrite`` is False, and for every mistake in corpus or config.
    """
    table = {"recipe": RECIPE, **config.model_dump(mode="json", exclude={"out"})}
    input_hash = _input_hash(config)
    if present := _present(config.out, table, input_hash, overwrite):
        return present
    drops = filters.Drops()
    documents = _read(config, drops, progress)
    sides, unit = assign(documents, config.split)
    order = sorted(documents, key=lambda key: _rank(config.seed, key))
    train = (documents[key].text for key in order if sides[key] == "train")
    tokenizer = _tokenizer(config.tokenizer, train)
    rows = _encode(config, tokenizer, [(key, documents[key]) for key in order], drops, progress)
    _check_lossless(drops, len(documents), tokenizer)
    by_side = {name: [row for row in rows if sides[row.document_id] == name] for name in SPLITS}
    check_sides({name: len(rows) for name, rows in by_side.items()}, config.split, unit)
    facts = Facts(
        vocab_size=tokenizer.vocab_size,
        split_by=unit,
        config=table,
        input_hash=input_hash,
        drops=drops.counts,
        drop_samples=drops.samples(),
        created_by=_versions(),
    )
    return write_folder(
        config.out,
        by_side,
        tokenizer.json_bytes,
        facts,
        shard_bytes=config.shard_bytes,
        overwrite=overwrite or config.out.exists(),
    )


def _read(config: PrepareConfig, drops: filters.Drops, progress: bool) -> dict[str, SourceDocument]:
    """document id -> document, without duplicates."""
    items = itertools.islice(sources.documents(config.source), config.max_documents)
    shown = _shown(items, "reading", None, progress)
    documents = filters.unique(filters.admitted(shown, drops), drops)
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in drops.counts.items())
        raise UserError(
            f"[source] kind = {config.source.kind}: no documents ({reasons or 'it is empty'}); "
            "give it text"
        )
    return documents


def _encode(
    config: PrepareConfig,
    tokenizer: PlainTokenizer,
    pairs: list[tuple[str, SourceDocument]],
    drops: filters.Drops,
    progress: bool,
) -> list[Document]:
    maker = RowMaker(tokenizer, config.cuts, config.seed)
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    kept: list[Document] = []
    for batch in _shown(batches, "encoding", len(batches), progress):
        for row in maker.rows(batch):
            if isinstance(row, Drop):
                drops.add(row)
            else:
                kept.append(row)
    return kept


def _tokenizer(
    config: TokenizerFile | TokenizerTrained | TokenizerBytes, train: Iterable[str]
) -> PlainTokenizer:
    if isinstance(config, TokenizerFile):
        return PlainTokenizer.read(config.path)
    size = config.vocab_size if isinstance(config, TokenizerTrained) else 256
    return PlainTokenizer(train_byte_pairs(train, size), "[tokenizer]")


def _check_lossless(drops: filters.Drops, total: int, tokenizer: PlainTokenizer) -> None:
    lossy = drops.counts["not_lossless"]
    if lossy > MAX_LOSSY_SHARE * total:
        where = drops.samples()["not_lossless"][0]["where"]
        raise UserError(
            f"{tokenizer.where}: loses bytes of {lossy} of {total} documents, e.g. {where}; "
            "choose a byte-level or byte-fallback tokenizer"
        )


def _rank(seed: int, key: str) -> str:
    return digest(f"order/{seed}/{key}".encode())


def _input_hash(config: PrepareConfig) -> str | None:
    """Of everything outside the configuration that the bytes depend on; None: unknown."""
    corpus = sources.fingerprint(config.source)
    if corpus is None or not isinstance(config.tokenizer, TokenizerFile):
        return corpus
    given = PlainTokenizer.read(config.tokenizer.path).json_bytes
    return digest(f"{corpus} {digest(given)}".encode())


def _present(
    out: Path, table: dict[str, Any], input_hash: str | None, overwrite: bool
) -> Manifest | None:
    """The manifest of a folder that needs no work; None: write it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / NAME).is_file():
        raise UserError(f"{out}: not a shard folder, so it is not touched; choose another out")
    if overwrite:
        return None
    found = read_manifest(out)
    change = _difference(found, table, input_hash)
    if change:
        raise UserError(f"{out}: holds other shards ({change}); give --overwrite or another out")
    try:
        ShardFolder.open(out)
    except UserError as error:
        _say(f"{error}: writing it again")
        return None
    _say(f"{out}: already prepared from this corpus and configuration")
    return found


def _difference(found: Manifest, table: dict[str, Any], input_hash: str | None) -> str | None:
    keys = sorted(key for key in table if found.config.get(key) != table[key])
    if keys:
        return f"another {', '.join(keys)}"
    if input_hash is None:
        return "the source cannot tell whether its corpus is the same"
    return "the corpus has changed" if found.input_hash != input_hash else None


def _shown(items: Iterable[_Item], what: str, total: int | None, progress: bool) -> Iterable[_Item]:
    """The same items, with a progress line on stderr."""
    if not progress or not _STDERR.is_terminal:
        return items
    return track(items, description=what, total=total, console=_STDERR, transient=True)


def _say(line: str) -> None:
    _STDERR.print(line, markup=False, highlight=False, soft_wrap=True)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "pyarrow": pyarrow.__version__,
        "tokenizers": tokenizers.__version__,
    }
