"""Byte offsets in a text: where words, sentences, paragraphs and code end.

Most scripts put a space between words. Those that do not (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) have places between letters instead, in texts where such places outnumber the spaces.
"""

import re

import numpy as np
from jaxtyping import Bool, Int64

# A sentence: a mark, closing quotes or brackets, then whitespace and something that can open the
# next one. Non-ASCII openers are let through, for capitals outside ASCII cannot be told by bytes.
# The mark comes first, so that the search skips from mark to mark.
_CLOSERS = rb"(?:[\"')\]*_]|\xe2\x80[\x99\x9d])*"
_SENTENCE = re.compile(
    rb"[.!?\xe2](?<![^A-Za-z][A-Z][.!?\xe2])"  # not the dot of an initial
    + rb"(?:(?<!\xe2)|\x80\xa6)"
    + _CLOSERS
    + rb"(?=\s+[\"'(\[*_#>-]*[A-Z0-9\x80-\xff])"
)
_BREAK = re.compile(rb"\n[^\S\n]*\n")
_FENCE = re.compile(rb"^(```++|~~~++)[^\n]*+\n.*?(?:^\1[^\n]*$|\Z)", re.DOTALL | re.MULTILINE)
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\f\v"))

# Letters that may follow a cut: no vowel sign, no small or repeated kana, no combining mark.
_FIRST = (
    "\u3042\u3044\u3046\u3048\u304a-\u3062\u3064-\u3082\u3084\u3086\u3088-\u308d\u308f-\u3094"
    "\u30a2\u30a4\u30a6\u30a8\u30aa-\u30c2\u30c4-\u30e2\u30e4\u30e6\u30e8-\u30ed\u30ef-\u30f4"
    "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u0e01-\u0e2e\u0e40-\u0e44\u0e81-\u0eae\u0ec0-\u0ec4"  # Thai, Lao: consonants, leading vowels
    "\u1780-\u17b3\u1000-\u102a"  # Khmer, Burmese
)
# What may precede it: those letters, their signs and marks, but no leading vowel and no stacker.
_LAST = (
    "\u3005\u3007\u3041-\u3096\u309d-\u309e\u30a1-\u30fa\u30fc-\u30fe\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af\u0e01-\u0e3a\u0e45-\u0e4e\u0e81-\u0ebd\u0ec6-\u0ece"
    "\u1780-\u17d1\u17d3-\u17dd\u1000-\u1038\u103a-\u104b\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a"
)
_LINK = r"(?:https?://|www\.)[^\s\u3001\u3002\u300d\u300f\uff08\uff09\uff0c]*"
_INSIDE = re.compile(f"{_LINK}|(?<=[{_LAST}])(?=[{_FIRST}])")
_STOP = re.compile(
    "[\u3002\uff01\uff1f\uff61\u17d4\u104b]+[\u300d\u300f\u3011\u300b\u3009\uff09\u201d\u2019)\"']*"
)
_THREE_BYTES = 0xE0
"""The first byte of a letter of these scripts is this or more."""


def word_ends(text: bytes) -> Int64[np.ndarray, " K"]:
    """Of whitespace after something else."""
    space = _IS_SPACE[np.frombuffer(text, np.uint8)]
    return np.flatnonzero(space[1:] & ~space[:-1]) + 1


def paragraph_ends(text: bytes, words: Int64[np.ndarray, " K"]) -> Int64[np.ndarray, " P"]:
    """Those of the word ends whose whitespace has two newlines or more."""
    breaks = [match.start() for match in _BREAK.finditer(text)]
    before = np.searchsorted(words, breaks, side="right") - 1
    return words[np.unique(before[before >= 0])]


def sentence_ends(text: bytes) -> Int64[np.ndarray, " K"]:
    """After a mark and what closes with it, where another sentence may begin."""
    return np.array([match.end() for match in _SENTENCE.finditer(text)], np.int64)


def in_code(text: bytes, places: Int64[np.ndarray, " K"]) -> Bool[np.ndarray, " K"]:
    """Which places lie in fenced code."""
    edges = np.array([fence.span() for fence in _FENCE.finditer(text)], np.int64).ravel()
    # Fences do not overlap: behind an odd number of their edges is inside; an edge itself is not.
    behind = np.searchsorted(edges, places)
    return (behind % 2 == 1) & ~np.isin(places, edges)


def unspaced(
    text: bytes, num_words: int
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " S"]]:
    """Places between letters, links left out, and after the marks that end sentences.

    None in a text with at least as many word ends (``num_words``) as such places.
    """
    data = np.frombuffer(text, np.uint8)
    if np.count_nonzero(data >= _THREE_BYTES) <= num_words:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    string = text.decode()
    letters = [match.start() for match in _INSIDE.finditer(string) if not match.group()]
    if len(letters) <= num_words:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    stops = [match.end() for match in _STOP.finditer(string) if match.end() < len(string)]
    # Byte offset of every character: where no continuation byte is.
    offsets = np.flatnonzero(data & 0xC0 != 0x80)
    return offsets[letters], offsets[stops]
