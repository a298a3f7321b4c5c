"""MinHash of word n-grams: texts that share most of them share a band with known probability.

Broder 1997, "On the resemblance and containment of documents", banded as in Leskovec et al., "Mining
of Massive Datasets", section 3.4: B bands of R hashes each; two texts with similarity s meet in a
band with probability 1 - (1 - s^R)^B. The hashes are keyed mixers of 64 bits instead of affine maps.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Shaped

WORD = re.compile(r"\w+")
_ROWS = 2048
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return WORD.findall(text.lower())


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every bit of the input moves every bit of the output."""
    for multiplier, shift in zip(_MULTIPLIERS, (30, 27), strict=True):
        values = (values ^ (values >> np.uint64(shift))) * multiplier
    return values ^ (values >> np.uint64(31))


def ngrams(tokens: Sequence[str], size: int) -> Shaped[np.ndarray, " N"]:
    """A 64-bit hash of every run of ``size`` words; a shorter text is one run."""
    if not tokens:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(map(word_hash, tokens), np.uint64, len(tokens))
    size = min(size, len(tokens))
    found = np.zeros(len(tokens) - size + 1, np.uint64)
    for place in range(size):
        found = mixed(found + hashes[place : place + len(found)])
    return found


@functools.lru_cache(maxsize=1 << 17)
def word_hash(word: str) -> int:
    """64 bits of a word."""
    data = word.encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def signature(text: str, bands: int, rows: int, size: int) -> Shaped[np.ndarray, " B"]:
    """One hash a band: equal in two texts that agree in all ``rows`` minima of the band."""
    grams = ngrams(words(text), size)
    keys = _keys(bands * rows)
    least = np.full(bands * rows, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(grams), _ROWS):
        part = mixed(grams[start : start + _ROWS, None] ^ keys)
        least = np.minimum(least, part.min(axis=0))
    found = np.zeros(bands, np.uint64)
    for column in least.reshape(bands, rows).T:
        found = mixed(found + column)
    return found


@functools.cache
def _keys(count: int) -> np.ndarray:
    return mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def clusters(bands: Iterable[np.ndarray], num: int) -> Shaped[np.ndarray, " N"]:
    """For each of ``num`` texts the least number of any text it is connected with.

    ``bands`` are looked at one after another, so only one of them has to be in memory.
    """
    label = np.arange(num)
    for band in bands:
        first, member = _pairs(np.asarray(band))
        label = _joined(label, first, member)
    return label


def _pairs(band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, member) of texts with equal hashes."""
    order = np.argsort(band, kind="stable")
    same = band[order[1:]] == band[order[:-1]]
    starts = np.concatenate([[True], ~same]) if len(band) else np.zeros(0, bool)
    leader = order[np.maximum.accumulate(np.where(starts, np.arange(len(band)), 0))]
    return leader[1:][same], order[1:][same]


def _joined(label: np.ndarray, first: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Least label of each connected part, by repeated minima along edges and pointer jumping."""
    while len(first):
        one, two = label[first], label[member]
        # Only the owners of labels move: a text that left its part alone would take the link along.
        np.minimum.at(label, one, np.minimum(one, two))
        np.minimum.at(label, two, np.minimum(one, two))
        while ((shorter := label[label]) != label).any():
            label = shorter
        still = label[first] != label[member]
        first, member = first[still], member[still]
    return label
