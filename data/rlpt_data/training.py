"""The tokenizer of a shard folder: given, trained on the train split, or the bytes themselves."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlpt_data.documents import SourceDocument
from rlpt_data.strict import Strict
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs


class TokenizerFile(Strict):
    kind: Literal["file"]
    path: Path
    """A tokenizer.json, or a Hugging Face folder that holds one."""


class TokenizerTrained(Strict):
    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=4096, ge=257)
    """Bytes and merges together; trained on the train split."""
    sample_bytes: int = Field(default=1 << 30, ge=1)
    """Of a larger train split the first so many bytes in shuffled order."""


class TokenizerBytes(Strict):
    kind: Literal["byte"]


def tokenizer_of(
    config: TokenizerFile | TokenizerTrained | TokenizerBytes, train: Iterable[SourceDocument]
) -> PlainTokenizer:
    """Ready to encode; ``train`` is read only where one is trained."""
    if isinstance(config, TokenizerFile):
        return PlainTokenizer.read(config.path)
    if isinstance(config, TokenizerBytes):
        return PlainTokenizer(train_byte_pairs((), 256), "[tokenizer]")
    texts = _first_bytes(train, config.sample_bytes)
    return PlainTokenizer(train_byte_pairs(texts, config.vocab_size), "[tokenizer]")


def _first_bytes(documents: Iterable[SourceDocument], count: int) -> Iterator[str]:
    for document in documents:
        if count <= 0:
            return
        yield document.text
        count -= len(document.text.encode())
