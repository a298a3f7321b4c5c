"""Text -> ids, as plain text and without loss.

Nothing in a web page is special: ``</think>`` or ``<|im_end|>`` on a page are characters like any
other. So the tokenizer used for encoding is the given one without its added tokens, without
normalizers that change text, without a prefix space and without a begin-of-text id. The ids that
this takes away stay reserved. Whether bytes survive is checked for every document.
"""

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import UInt32

from rlpt_data.strict import UserError, json_of
from rlpt_data.token_bytes import byte_alphabet, read_tokenizer, token_bytes_of

_REWRITING = ("Prepend", "NFC")
"""Normalizers left out: a dummy prefix invents a byte, NFC composes characters."""

# Whitespace as the tokenizer knows it: to Python four control characters are some, too.
_LONG_WORD = re.compile(r"([\S\x1c-\x1f]{512}|[^\S\x1c-\x1f]{512})")


@dataclass(frozen=True)
class PlainTokenizer:
    """Encodes documents; knows the bytes of every id."""

    json_bytes: bytes
    """The tokenizer.json as given, byte for byte: what the shard folder keeps."""
    where: str

    @classmethod
    def read(cls, path: Path) -> "PlainTokenizer":
        """From a tokenizer.json or a Hugging Face folder. Raises UserError."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file}: no such file; give a tokenizer.json or a folder with one")
        read_tokenizer(file)
        return cls(file.read_bytes(), str(file))

    @classmethod
    def cached(cls, path: Path) -> "PlainTokenizer":
        """As ``read``, once a process for the same bytes: what is made of them takes seconds."""
        return _cached(path.read_bytes(), str(path))

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes of every id; b"" for ids that plain text never yields."""
        return token_bytes_of(json_of(self.json_bytes))

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @functools.cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        table = json_of(self.json_bytes)
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(plain(table)))
        except Exception as error:  # the binding raises bare Exception
            raise UserError(f"{self.where}: not usable: {error}; give another one") from error

    @functools.cached_property
    def _pieces(self) -> np.ndarray:
        """``token_bytes`` as an array, to be indexed by arrays."""
        return np.array(self.token_bytes, object)

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(piece) for piece in self.token_bytes], np.int64)

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " T"]]:
        """Ids of each text; no id is added, none is special."""
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def offsets(self, ids: UInt32[np.ndarray, " T"]) -> UInt32[np.ndarray, " T+1"]:
        """Byte offset of each token's start, and the total."""
        ends = np.cumsum(self._lengths[ids])
        return np.concatenate([[0], ends]).astype(np.uint32)

    def decode(self, ids: UInt32[np.ndarray, " T"]) -> bytes:
        """The exact bytes of a sequence of ids."""
        return b"".join(self._pieces[ids].tolist())


@functools.lru_cache(maxsize=2)
def _cached(json_bytes: bytes, where: str) -> PlainTokenizer:
    return PlainTokenizer(json_bytes, where)


def plain(table: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that encodes every text as plain text."""
    # The model, which is most of the file, stays as it is: only these parts are changed.
    small = {key: copy.deepcopy(table.get(key)) for key in ("normalizer", "pre_tokenizer")}
    table = {**table, **small}
    table.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    table["normalizer"] = _without_rewriting(table.get("normalizer"))
    for part in _parts(table.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    return table


def _parts(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[children] if part["type"] == "Sequence" else [part]


def _without_rewriting(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    kept = [p for p in _parts(normalizer, "normalizers") if p["type"] not in _REWRITING]
    return {"type": "Sequence", "normalizers": kept} if kept else None


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> bytes:
    """A byte-level BPE tokenizer.json trained on ``texts``; 256 gives bytes without merges.

    Raises UserError when the corpus does not hold enough pairs for ``vocab_size``.
    """
    if vocab_size == 256:
        return _byte_tokenizer()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=list(byte_alphabet().values()),
        show_progress=False,
    )
    model.train_from_iterator((piece for text in texts for piece in _short_words(text)), trainer)
    if (size := model.get_vocab_size()) < vocab_size:
        raise UserError(
            f"[tokenizer] vocab_size = {vocab_size}: the corpus yields {size}; lower it"
        )
    return model.to_str(pretty=True).encode()


def _short_words(text: str) -> Iterator[str]:
    """A text, with words of no end cut into pieces: training takes the square of a word's length."""
    return filter(None, _LONG_WORD.split(text))


def _byte_tokenizer() -> bytes:
    """Id b is byte b, nothing else."""
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _byte_level_part(),
        "post_processor": None,
        "decoder": _byte_level_part(),
        "model": {
            "type": "BPE",
            "vocab": {byte_alphabet()[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    return json.dumps(table, indent=1, ensure_ascii=False).encode()


def _byte_level_part() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
