"""The opener and the closer as two single ids that text can never contain.

Text is encoded without added tokens, so an added token's id never stands for text: a tokenizer's own `<think>` serves.
Otherwise new ids follow the tokenizer's last one, in rows the embedding already has or in rows added to it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpt.config import PolicyConfig
from rlpt.types import Markers
from rlpt_data.strict import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a policy: text ids, then the markers."""

    markers: Markers
    text_size: int
    """Ids of the tokenizer; text uses only these."""
    size: int
    """Rows of the embedding."""


def read_tokenizer(path: Path) -> dict[str, Any]:
    """The parsed tokenizer.json. Raises UserError when there is none, or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no tokenizer there; a policy folder needs its tokenizer.json")
    try:
        table = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; put a whole tokenizer.json there") from error
    if not isinstance(table, dict) or "vocab" not in (table.get("model") or {}):
        raise UserError(
            f"{path}: no model.vocab inside; put a tokenizer.json of Hugging Face there"
        )
    return table


def tokenizer_size(tokenizer: dict[str, Any]) -> int:
    ids = [
        *tokenizer["model"]["vocab"].values(),
        *(token["id"] for token in tokenizer.get("added_tokens") or []),
    ]
    return 1 + max(ids)


def vocabulary(cfg: PolicyConfig, tokenizer: dict[str, Any], embedding_rows: int) -> Vocabulary:
    """Find or allot the two marker ids. ``embedding_rows`` is 0 for a model that is yet to be made.

    Raises UserError where a marker is no single id and may not be added.
    """
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    size = tokenizer_size(tokenizer)
    ids, free = [], size
    for marker in (cfg.opener, cfg.closer):
        if marker not in added and not cfg.add_markers:
            raise UserError(
                f"policy: the tokenizer has no single id for {marker!r}; set policy.add_markers = true, "
                "or name two of its added tokens as policy.opener and policy.closer"
            )
        ids.append(added.get(marker, free))
        free += marker not in added
    return Vocabulary(Markers(*ids), size, max(free, embedding_rows))


def same_text_tokenizer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tokenizers give every plain text the same ids; added tokens do not count, text never uses them."""
    return all(
        one.get(part) == other.get(part) for part in ("model", "pre_tokenizer", "normalizer")
    )


def with_markers(tokenizer: dict[str, Any], cfg: PolicyConfig, markers: Markers) -> dict[str, Any]:
    """The tokenizer with the markers among its added tokens, for export."""
    present = {token["content"] for token in tokenizer.get("added_tokens") or []}
    new = [
        {"id": index, "content": content, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for content, index in zip((cfg.opener, cfg.closer), markers.ids, strict=True)
        if content not in present
    ]
    return tokenizer | {"added_tokens": [*(tokenizer.get("added_tokens") or []), *new]}
