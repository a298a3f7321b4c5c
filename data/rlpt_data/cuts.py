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
from jaxtyping import UInt8, UInt32
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


class CutsConfig(Strict):
    kinds: tuple[Literal["sentence", "paragraph", "random"], ...] = (
        "sentence",
        "paragraph",
        "random",
    )
    """Which candidates to store; the trainer chooses among them."""
    min_context: int = Field(default=32, ge=1)
    """Tokens before a cut, at least."""
    min_continuation: int = Field(default=32, ge=1)
    """Tokens after a cut, at least."""
    random_every: int = Field(default=32, ge=1)
    """One random candidate for about this many tokens."""


def candidates(
    text: bytes,
    offsets: UInt32[np.ndarray, " edges"],
    document_id: str,
    config: CutsConfig,
    seed: int,
) -> tuple[UInt32[np.ndarray, " K"], UInt8[np.ndarray, " K"]]:
    """Token positions, increasing, and the kind of each.

    Where two kinds meet the first of paragraph, sentence, random names the cut.
    """
    words = _positions(_matches(_WORD, text), offsets, config)
    # Later kinds overwrite earlier ones: the most telling name last.
    found = dict.fromkeys(_random(words, len(offsets) - 1, document_id, config, seed), "random")
    for kind, pattern in (("sentence", _SENTENCE), ("paragraph", _PARAGRAPH)):
        ends = _positions(_matches(pattern, text), offsets, config)
        found |= dict.fromkeys(ends.tolist(), kind)
    kept = sorted(cut for cut, kind in found.items() if kind in config.kinds)
    kinds = [CUT_KINDS.index(found[cut]) for cut in kept]
    return np.array(kept, np.uint32), np.array(kinds, np.uint8)


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
    key = hashlib.blake2b(f"cuts/{seed}/{document_id}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
    count = min(len(words), 1 + num_tokens // config.random_every)
    return generator.choice(words, count, replace=False).tolist()
