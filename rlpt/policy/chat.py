"""A frame's texts -> ids: special tokens as the tokenizer's single ids, words encoded like any page text."""

from typing import Any

import numpy as np

from rlpt.config import PolicyConfig
from rlpt.templates import TEMPLATES, AskedFrame, ChatFrame, InlineFrame, split
from rlpt.types import Frame
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError


def frame_of(
    cfg: InlineFrame | ChatFrame | AskedFrame,
    policy: PolicyConfig,
    shards: ShardFolder,
    tokenizer: dict[str, Any],
    instruction: str = "prompts.frame.instruction",
) -> Frame:
    """The ids of a frame. Raises UserError where the tokenizer lacks a special token, or a text spells one.

    ``instruction``: the key of the configuration that has the frame's.
    """
    if isinstance(cfg, InlineFrame):
        return Frame()
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    special = {policy.opener, policy.closer, *added}
    if isinstance(cfg, AskedFrame):
        check_text(instruction, cfg.words, special)
        return Frame(tail=tuple(int(index) for index in shards.encode(cfg.words)))
    _check_specials(cfg, added)
    check_text(instruction, cfg.instruction, special)
    for name in ("system", "prefill", "bridge", "answer_open", "answer_close"):
        check_text(f"prompts.frame.{name}", getattr(cfg, name), special)
    head, tail, lead, prefill, bridge = (_encoded(each, cfg, added, shards) for each in cfg.pieces)
    answer = (cfg.answer_open.encode(), cfg.answer_close.encode()) if cfg.answer_open else None
    return Frame(head, tail, lead, prefill, bridge, answer)


def _check_specials(cfg: ChatFrame, added: dict[str, int]) -> None:
    if absent := [special for special in cfg.known.specials if special not in added]:
        fitting = [name for name, each in TEMPLATES.items() if {*each.specials} <= {*added}]
        raise UserError(
            f"prompts.frame.template = {cfg.template!r}: the tokenizer has no special token {absent[0]!r}; its tokens "
            f"fit {', '.join(fitting)}"
        )


def check_text(where: str, text: str, special: set[str]) -> None:
    """A special token that a text spells would be letters; whoever wrote it meant something else."""
    if spelt := [each for each in sorted(special) if each in text]:
        raise UserError(
            f"{where}: contains {spelt[0]!r}, which only the template and the thought itself write; leave it out"
        )


def _encoded(
    text: str, cfg: ChatFrame, added: dict[str, int], shards: ShardFolder
) -> tuple[int, ...]:
    parts = [
        np.array([added[part]]) if special else shards.encode(part)
        for part, special in split(text, cfg.known.specials)
    ]
    return tuple(int(index) for part in parts for index in part)
