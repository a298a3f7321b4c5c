"""Text is encoded as plain text, and no byte is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpt_data.strict import UserError
from rlpt_data.token_bytes import byte_alphabet, token_bytes_of
from rlpt_data.tokenizer import PlainTokenizer, plain, train_byte_pairs

PROSE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40
SPECIALS = ("<think>", "</think>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "[INST]")
NASTY = (
    *("\r\n", "\0", "\t \n\n  ", " ", "e\u0301", "\u00e9", "\U0001f600\u200d\U0001f525", "\ufeff"),
    *("<0x0A>", "日本語。", "\u00a0", "\ufb01", "ÿĀ"),
)
PIECES = st.one_of(st.sampled_from(SPECIALS + NASTY), st.text(max_size=8))
TEXT = st.lists(PIECES, max_size=12).map("".join)


def byte_pairs_with_specials() -> PlainTokenizer:
    """Byte-level, with special tokens, a prefix space, NFC and a begin-of-text id in the file."""
    table = json.loads(train_byte_pairs([PROSE], 300))
    table["added_tokens"] = [
        {"id": 300 + i, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, text in enumerate(SPECIALS)
    ]
    table["normalizer"] = {"type": "NFC"}
    table["pre_tokenizer"]["add_prefix_space"] = True
    begin = {"id": "<s>", "ids": [304], "tokens": ["<s>"]}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": begin},
    }
    return PlainTokenizer(json.dumps(table).encode(), "byte pairs")


def byte_fallback() -> PlainTokenizer:
    """Sentence-piece style: a symbol for the space, single bytes as <0x..>, a dummy prefix."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "\u2581th", "é"]
    part = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], "special": True} | part for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [["t", "h"], ["\u2581", "th"]],
        },
    }
    return PlainTokenizer(json.dumps(table).encode(), "byte fallback")


TOKENIZERS = {
    "bpe": byte_pairs_with_specials(),
    "fallback": byte_fallback(),
    "byte": PlainTokenizer(train_byte_pairs([], 256), "bytes"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_tokens_spell_exactly_the_bytes_of_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode([text])[0]
    # Byte-fallback tokenizers cannot tell the space from its symbol: the check at prepare drops.
    if name != "fallback" or "\u2581" not in text:
        assert tokenizer.decode(ids) == text.encode()
    offsets = tokenizer.offsets(ids)
    assert offsets[0] == 0
    spelled = [tokenizer.token_bytes[index] for index in ids]
    assert np.diff(offsets.astype(int)).tolist() == [len(piece) for piece in spelled]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", SPECIALS)
def test_a_special_token_written_on_a_page_is_ordinary_text(name: str, special: str) -> None:
    tokenizer = TOKENIZERS[name]
    table = json.loads(tokenizer.json_bytes)
    reserved = {token["id"] for token in table["added_tokens"] if token["special"]}
    ids = tokenizer.encode([f"a {special} b{special}"])[0].tolist()
    assert not reserved.intersection(ids)
    assert len(ids) > 4
    assert all(tokenizer.token_bytes[index] == b"" for index in reserved)


def test_the_unstripped_tokenizer_would_have_seen_specials() -> None:
    """The precondition of the test above: the fixture really has something to strip."""
    original = tokenizers.Tokenizer.from_str(TOKENIZERS["bpe"].json_bytes.decode())
    ids = original.encode("a </think> b").ids
    assert ids[0] == 304
    assert 301 in ids


def test_ids_agree_with_the_given_tokenizer_on_ordinary_text() -> None:
    given_json = train_byte_pairs([PROSE], 300)
    theirs = tokenizers.Tokenizer.from_str(given_json.decode()).encode(PROSE).ids
    assert PlainTokenizer(given_json, "").encode([PROSE])[0].tolist() == theirs


def test_byte_tokenizer_ids_are_the_bytes() -> None:
    text = "aé\0\n"
    assert TOKENIZERS["byte"].encode([text])[0].tolist() == list(text.encode())
    assert TOKENIZERS["byte"].vocab_size == 256


def test_byte_alphabet_is_the_one_byte_level_tokenizers_use() -> None:
    library = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert set(byte_alphabet().values()) == library
    # Space and newline are the well-known ones.
    assert (byte_alphabet()[32], byte_alphabet()[10]) == ("\u0120", "\u010a")


def test_added_tokens_that_are_not_special_keep_their_text_and_holes_are_empty() -> None:
    table = json.loads(train_byte_pairs([], 256))
    table["added_tokens"] = [
        {"id": 258, "content": "  ", "special": False},
        {"id": 257, "content": "<end>", "special": True},
    ]
    pieces = token_bytes_of(table)
    assert pieces[256:] == [b"", b"", b"  "]
    assert pieces[:256] == [bytes([byte]) for byte in range(256)]
    assert plain(table)["added_tokens"] == []
    assert plain(table | {"post_processor": {"type": "ByteLevel"}})["post_processor"] is None
    assert len(table["added_tokens"]) == 2


def test_training_is_deterministic_and_refuses_a_corpus_too_small_for_the_vocabulary() -> None:
    assert train_byte_pairs([PROSE], 290) == train_byte_pairs([PROSE], 290)
    with pytest.raises(UserError, match=r"vocab_size = 4096: the corpus yields \d+; lower it"):
        train_byte_pairs([PROSE], 4096)


def test_what_is_no_tokenizer_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.tokenizer\.json|absent: no such file"):
        PlainTokenizer.read(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.vocab inside"):
        PlainTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        PlainTokenizer.read(tmp_path)
