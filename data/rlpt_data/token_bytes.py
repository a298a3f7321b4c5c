"""The bytes each token id stands for, read from a tokenizer.json without running it.

Two families are lossless: byte-level (every character of a token is one byte in disguise) and
byte-fallback (tokens are text, a meta symbol for the space, and ``<0x0A>`` for single bytes).
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

from rlpt_data.strict import UserError, json_of

SPACE_SYMBOL = "\u2581"
MAX_IDS = 1 << 24
"""More tokens than any tokenizer has: a larger id is a mistake, and would cost its own size in memory."""
_ADDED = {"id": int, "content": str, "special": bool}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(path: Path) -> list[bytes]:
    """Bytes of every id, indexed by id.

    b"" stands for "no text at all": special tokens and holes in the numbering. Web text is encoded
    as plain text, so such an id never occurs in a shard.
    """
    return token_bytes_of(read_tokenizer(path))


def read_tokenizer(path: Path) -> dict[str, Any]:
    """The parsed tokenizer.json. Raises UserError when it is not one."""
    try:
        table = json_of(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a tokenizer: {error}; give a tokenizer.json") from error
    model = table.get("model") if isinstance(table, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{path}: no model.vocab inside; give a tokenizer.json of Hugging Face")
    if wrong := _wrong(model["vocab"], table.get("added_tokens") or []):
        raise UserError(f"{path}: {wrong}; give a tokenizer.json of Hugging Face")
    return table


def _wrong(vocab: Any, added: Any) -> str:
    """What keeps the tokens from being a numbered list; "" when nothing does."""
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        return "model.vocab or added_tokens is no list of tokens"
    if isinstance(vocab, list) and not all(_is_piece(piece) for piece in vocab):
        return "model.vocab holds what is no token with its score"
    if not all(isinstance(token, dict) and _ADDED.items() <= _types(token) for token in added):
        return f"added_tokens: every one needs {', '.join(_ADDED)}"
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token["id"] for token in added)]
    strange = [index for index in ids if type(index) is not int or not 0 <= index < MAX_IDS]
    return f"{str(strange[0])[:40]} is no id" if strange else ""


def _is_piece(piece: Any) -> bool:
    return isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)


def _types(token: dict[str, Any]) -> set[tuple[str, type]]:
    return {(name, type(value)) for name, value in token.items()}


def token_bytes_of(table: dict[str, Any]) -> list[bytes]:
    """As ``token_bytes``, from the parsed file."""
    vocab = _vocab(table["model"])
    added = table.get("added_tokens") or []
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)], default=-1)
    to_bytes = _byte_level if is_byte_level(table) else _text_reader(table)
    result = [b""] * size
    for token, index in vocab.items():
        result[index] = to_bytes(token)
    for token in added:
        result[token["id"]] = b"" if token["special"] else token["content"].encode()
    return result


def is_byte_level(table: dict[str, Any]) -> bool:
    """Whether tokens are spelled in the byte-to-character alphabet."""
    parts = [table.get("pre_tokenizer"), table.get("decoder")]
    return any('"ByteLevel"' in json.dumps(part) for part in parts if part)


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character byte-level tokenizers write for it.

    Bytes that print in Latin-1 stand for themselves, the other 68 follow from U+0100 upwards.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece[0]: index for index, piece in enumerate(vocab)}


def _byte_level(token: str) -> bytes:
    table = _alphabet_bytes()
    return b"".join(table.get(character) or character.encode() for character in token)


@functools.cache
def _alphabet_bytes() -> dict[str, bytes]:
    return {character: bytes([byte]) for byte, character in byte_alphabet().items()}


def _text_reader(table: dict[str, Any]) -> Any:
    fallback = bool(table["model"].get("byte_fallback"))
    parts = [table.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    # The symbol shows up literally, or as the implied symbol of a Metaspace part.
    spaced = any(
        SPACE_SYMBOL in text or '"Metaspace"' in text
        for text in (json.dumps(part, ensure_ascii=False) for part in parts if part)
    )

    def read(token: str) -> bytes:
        if fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token.replace(SPACE_SYMBOL, " ") if spaced else token).encode()

    return read
