"""Where a document may be cut into context and continuation.

A cut lies before whitespace and on a boundary of the document's own tokenisation, so the context's
ids are what the context alone would be encoded to, and the continuation starts with its space.
Candidates depend on nothing but the document and the seed. Cuts that came with the source are the
only candidates of their document.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8, UInt32
from pydantic import Field

from rlpt_data.shards import CUT_KINDS
from rlpt_data.strict import Strict

# A sentence: a mark, closing quotes or brackets, then whitespace and something that can open the
# next one. Non-ASCII openers are let through, for capitals outside ASCII cannot be told by bytes.
_CLOSERS = rb"(?:[\"')\]*_]|\xe2\x80[\x99\x9d])*"
_SENTENCE = re.compile(
    rb"(?<![^A-Za-z][A-Z])(?:[.!?]|\xe2\x80\xa6)"  # not the dot of an initial
    + _CLOSERS
    + rb"(?=\s+[\"'(\[*_#>-]*[A-Z0-9\x80-\xff])"
)
_PARAGRAPH = re.compile(rb"(?<=\S)(?=[^\S\n]*\n[^\S\n]*\n)")
_WORD = re.compile(rb"(?<=\S)(?=\s)")
_FENCE = re.compile(rb"^(```+|~~~+)[^\n]*\n.*?(?:^\1[^\n]*$|\Z)", re.DOTALL | re.MULTILINE)


class CutsConfig(Strict):
    kinds: tuple[Literal["sentence", "paragraph", "random", "every"], ...] = (
        "sentence",
        "paragraph",
        "random",
    )
    """Which candidates to store; the trainer chooses among them."""
    min_context: int = Field(default=32, ge=1)
    """Tokens before a cut, at least."""
    min_continuation: int = Field(default=32, ge=1)
    """Tokens after a cut, at least."""
    min_continuation_bytes: int = Field(default=0, ge=0)
    """Bytes of text after a cut, at least."""
    min_continuation_sentences: int = Field(default=0, ge=0)
    """Ends of sentences after a cut, at least."""
    random_every: int = Field(default=32, ge=1)
    """One random candidate for about this many tokens."""
    every: int = Field(default=64, ge=1)
    """For the kind `every`: the first place at or after each multiple of so many tokens."""
    code_fences: bool = True
    """Also cut inside fenced code."""
    per_document: int | None = Field(default=None, ge=1)
    """Keep so many of a document's candidates, drawn by (seed, document); None: all."""
    per_domain: int | None = Field(default=None, ge=1)
    """About so many cuts a domain: its documents share them; those left without one are dropped."""


def candidates(
    text: bytes,
    offsets: UInt32[np.ndarray, " edges"],
    document_id: str,
    config: CutsConfig,
    seed: int,
    limit: int | None = None,
) -> tuple[UInt32[np.ndarray, " K"], UInt8[np.ndarray, " K"]]:
    """Token positions, increasing, and the kind of each; no more than ``limit``.

    Where two kinds meet the first of paragraph, sentence, every, random names the cut.
    """
    words = word_cuts(text, offsets, config)
    # Later kinds overwrite earlier ones: the most telling name last.
    found = dict.fromkeys(_random(words, len(offsets) - 1, document_id, config, seed), "random")
    if "every" in config.kinds:
        found |= dict.fromkeys(_regular(words, config.every), "every")
    allowed = set(words.tolist())
    for kind, pattern in (("sentence", _SENTENCE), ("paragraph", _PARAGRAPH)):
        ends = _positions(_matches(pattern, text), offsets, config)
        found |= dict.fromkeys((end for end in ends.tolist() if end in allowed), kind)
    kept = sorted(cut for cut, kind in found.items() if kind in config.kinds)
    least = min((n for n in (config.per_document, limit) if n is not None), default=len(kept))
    if least < len(kept):
        draw = _generator(f"caps/{seed}/{document_id}")
        kept = sorted(draw.choice(kept, least, replace=False).tolist())
    kinds = [CUT_KINDS.index(found[cut]) for cut in kept]
    return np.array(kept, np.uint32), np.array(kinds, np.uint8)


def word_cuts(
    text: bytes, offsets: UInt32[np.ndarray, " edges"], config: CutsConfig
) -> Int64[np.ndarray, " K"]:
    """Every position where a cut may lie at all, as tokens: before whitespace, so inside no URL, no
    address and no grapheme; with enough text on both sides; outside code where that is asked for.
    """
    places = _matches(_WORD, text)
    if not config.code_fences:
        inside = np.zeros(len(places), bool)
        for fence in _FENCE.finditer(text):
            inside |= (places > fence.start()) & (places < fence.end())
        places = places[~inside]
    places = places[places <= len(text) - config.min_continuation_bytes]
    if config.min_continuation_sentences:
        ends = np.append(_matches(_SENTENCE, text), len(text))
        last = ends[-config.min_continuation_sentences - 1 :]
        enough = len(ends) > config.min_continuation_sentences
        places = places[places <= (last[0] if enough else -1)]
    return _positions(places, offsets, config)


def _regular(words: np.ndarray, every: int) -> list[int]:
    """The first position at or after every multiple; one that passes the next multiple is left out."""
    if not len(words):
        return []
    marks = np.arange(every, int(words[-1]) + 1, every)
    at = words[np.searchsorted(words, marks)]
    return at[at < marks + every].tolist()


def token_positions(
    places: Sequence[int], offsets: UInt32[np.ndarray, " edges"]
) -> list[int] | None:
    """Token position of each byte offset; None when one is not the start of a token."""
    at = np.searchsorted(offsets, places)
    missed = offsets[np.minimum(at, len(offsets) - 1)] != places
    return None if missed.any() else at.tolist()


def _matches(pattern: re.Pattern[bytes], text: bytes) -> np.ndarray:
    return np.array([match.end() for match in pattern.finditer(text)], np.int64)


def _positions(places: np.ndarray, offsets: np.ndarray, config: CutsConfig) -> np.ndarray:
    """Those byte offsets that are token boundaries with enough tokens on both sides, as tokens."""
    at = np.searchsorted(offsets, places)
    at = at[offsets[at] == places]
    return at[(at >= config.min_context) & (at <= len(offsets) - 1 - config.min_continuation)]


def _random(
    words: np.ndarray, num_tokens: int, document_id: str, config: CutsConfig, seed: int
) -> list[int]:
    if "random" not in config.kinds or not len(words):
        return []
    count = min(len(words), 1 + num_tokens // config.random_every)
    return _generator(f"cuts/{seed}/{document_id}").choice(words, count, replace=False).tolist()


def _generator(purpose: str) -> np.random.Generator:
    key = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
