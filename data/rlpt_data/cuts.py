"""Where a document may be cut into context and continuation.

A cut lies before whitespace and on a boundary of the document's own tokenisation, so the context's
ids are what the context alone would be encoded to, and the continuation starts with its space. In a
text without spaces it also lies between letters, where encoding the context alone was seen to agree.
Candidates depend on nothing but the document and the seed. Cuts that came with the source are the
only candidates of their document.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8, UInt32
from pydantic import Field

from rlpt_data import places
from rlpt_data.shards import CUT_KINDS
from rlpt_data.strict import Strict

_NONE = np.empty(0, np.int64)
Stable = Callable[[list[int]], list[bool]]
"""Of token positions: whether the context alone is encoded to the document's own ids."""


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
    stable: Stable | None = None,
) -> tuple[UInt32[np.ndarray, " K"], UInt8[np.ndarray, " K"]]:
    """Token positions, increasing, and the kind of each; no more than ``limit``.

    Where two kinds meet the first of paragraph, sentence, every, random names the cut. Between the
    letters of a text without spaces are cuts only where they are ``stable``; None: none are.
    """
    ends, sentences = places.word_ends(text), places.sentence_ends(text)
    letters, stops = places.unspaced(text, len(ends)) if stable else (_NONE, _NONE)
    if len(stops):
        sentences = np.union1d(sentences, stops)
    words = allowed = _allowed(ends, sentences, text, offsets, config)
    if len(letters):
        inner = _allowed(np.union1d(letters, stops), sentences, text, offsets, config)
        allowed = np.union1d(words, inner)
    # Later kinds overwrite earlier ones: the most telling name last.
    found = dict.fromkeys(_random(allowed, len(offsets) - 1, document_id, config, seed), "random")
    if "every" in config.kinds:
        found |= dict.fromkeys(_regular(allowed, config.every), "every")
    for kind, at in (("sentence", sentences), ("paragraph", places.paragraph_ends(text, ends))):
        named = np.intersect1d(_positions(at, offsets, config), allowed, assume_unique=True)
        found |= dict.fromkeys(named.tolist(), kind)
    kept = sorted(cut for cut, kind in found.items() if kind in config.kinds)
    if stable and len(allowed) > len(words):
        kept = _stable(kept, set(words.tolist()), stable)
    least = min((n for n in (config.per_document, limit) if n is not None), default=len(kept))
    if least < len(kept):
        draw = _generator(f"caps/{seed}/{document_id}")
        kept = sorted(draw.choice(kept, least, replace=False).tolist())
    kinds = [CUT_KINDS.index(found[cut]) for cut in kept]
    return np.array(kept, np.uint32), np.array(kinds, np.uint8)


def _stable(kept: list[int], words: set[int], stable: Stable) -> list[int]:
    """Without those between letters that are not."""
    asked = [cut for cut in kept if cut not in words]
    refused = {cut for cut, holds in zip(asked, stable(asked), strict=True) if not holds}
    return [cut for cut in kept if cut not in refused]


def word_cuts(
    text: bytes, offsets: UInt32[np.ndarray, " edges"], config: CutsConfig
) -> Int64[np.ndarray, " K"]:
    """Every position before whitespace where a cut may lie, as tokens: so inside no URL, no address
    and no grapheme; with enough text on both sides; outside code where that is asked for.
    """
    return _allowed(places.word_ends(text), places.sentence_ends(text), text, offsets, config)


def _allowed(
    at: np.ndarray, sentences: np.ndarray, text: bytes, offsets: np.ndarray, config: CutsConfig
) -> Int64[np.ndarray, " K"]:
    """The token positions of those byte offsets where the configuration lets a cut lie."""
    if not config.code_fences:
        at = at[~places.in_code(text, at)]
    at = at[at <= len(text) - config.min_continuation_bytes]
    if config.min_continuation_sentences:
        ends = np.append(sentences, len(text))
        last = ends[-config.min_continuation_sentences - 1 :]
        enough = len(ends) > config.min_continuation_sentences
        at = at[at <= (last[0] if enough else -1)]
    return _positions(at, offsets, config)


def _regular(words: np.ndarray, every: int) -> list[int]:
    """The first position at or after every multiple; one that passes the next multiple is left out."""
    if not len(words):
        return []
    marks = np.arange(every, int(words[-1]) + 1, every)
    at = words[np.searchsorted(words, marks)]
    return at[at < marks + every].tolist()


def token_positions(at: Sequence[int], offsets: UInt32[np.ndarray, " edges"]) -> list[int] | None:
    """Token position of each byte offset; None when one is not the start of a token."""
    tokens = np.searchsorted(offsets, at)
    missed = offsets[np.minimum(tokens, len(offsets) - 1)] != at
    return None if missed.any() else tokens.tolist()


def _positions(at: np.ndarray, offsets: np.ndarray, config: CutsConfig) -> np.ndarray:
    """Those byte offsets that are token boundaries with enough tokens on both sides, as tokens."""
    tokens = np.searchsorted(offsets, at)
    tokens = tokens[offsets[tokens] == at]
    last = len(offsets) - 1 - config.min_continuation
    return tokens[(tokens >= config.min_context) & (tokens <= last)]


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
