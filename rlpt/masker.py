"""A supply whose policy chooses what it predicts: paragraphs are asked for spans, and the spans become middle segments.

Both are sampled in the same take, predictions after their proposals, so that they reach the reward together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from rlpt.config import PromptConfig, RunConfig
from rlpt.lots import Lot
from rlpt.policy.chat import frame_of
from rlpt.policy.load import Blueprint
from rlpt.prompts import prompts_of, rearranged
from rlpt.reward.masker import MaskerConfig, Placing, Span
from rlpt.rollout.records import Row
from rlpt.supply import Supply
from rlpt.types import Frame, Group, Markers, Prompt, Trunk
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError


@dataclass(frozen=True)
class Masker:
    """Trunks -> paragraphs that are asked for a span; their groups -> one prompt for every span that was accepted."""

    placing: Placing
    prompts: PromptConfig
    asking: Frame
    """Of a paragraph that is asked for a span."""
    markers: Markers

    def proposal(self, trunk: Trunk) -> Prompt:
        """The text before the trunk's cut, with nothing held out."""
        (prompt,) = prompts_of(trunk, self.prompts, replace(self.markers, frame=self.asking))
        return replace(prompt, horizon=0)

    def masks(self, group: Group) -> list[Prompt]:
        """Of the spans that a paragraph's group proposes, each once."""
        spans = {each for each in self.placing(group) if isinstance(each, Span)}
        return [self._mask(paragraph(group.prompt), span) for span in sorted(spans)]

    def _mask(self, text: Trunk, span: Span) -> Prompt:
        cfg = self.prompts.model_copy(update={"horizon_tokens": span.stop - span.start})
        (prompt,) = prompts_of(rearranged(text, *span), cfg, self.markers)
        return prompt


def paragraph(prompt: Prompt) -> Trunk:
    """The page text before a prompt's cut, without a frame."""
    trunk, head = prompt.trunk, prompt.trunk.head
    offsets = trunk.offsets[head : prompt.cut + 1] - trunk.offsets[head]
    start, ids = trunk.start + head, prompt.context_ids
    return replace(trunk, start=start, ids=ids, offsets=offsets, cuts=(), head=0)


def masker_of(cfg: RunConfig, masker: MaskerConfig, shards: ShardFolder, plan: Blueprint) -> Masker:
    """Raises UserError where the instruction spells a special token."""
    frame = cfg.prompts.frame.asking(masker.instruction)
    markers = plan.vocabulary.markers
    return Masker(
        Placing(masker, markers.closer, partial(plan.token_bytes, shards)),
        # A paragraph is what a next segment has before it.
        cfg.prompts.model_copy(update={"segment": "next"}),
        frame_of(frame, cfg.policy, shards, plan.tokenizer, "masker.instruction"),
        markers,
    )


class MaskerSupply(Supply):
    """A lot's first group are the proposals of its paragraph, the others the predictions of its masks."""

    def __init__(self, masker: Masker, *parts: Any) -> None:
        super().__init__(*parts)
        self.masker = masker
        self.cfg = masker.prompts

    def _prompts(self, trunk: Trunk) -> list[Prompt]:
        return [self.masker.proposal(trunk)]

    def _collect(self, lots: Sequence[Lot]) -> None:
        """Proposals; then the predictions that they ask for."""
        fresh = [lot for lot in lots if lot.groups is None]
        super()._collect(fresh)
        asked: list[tuple[Lot, Prompt]] = []
        for lot in fresh:
            asked += [
                (lot, mask) for group in lot.groups or () for mask in self.masker.masks(group)
            ]
        asked.sort(key=_length)
        tickets: list[str] = []
        for length, alike in groupby(asked, key=_length):
            tickets += self._ask([mask for _, mask in alike], length)
        for (lot, mask), group in zip(asked, self.engine.collect(tickets), strict=True):
            lot.prompts.append(mask)
            lot.groups = [*(lot.groups or ()), group]

    def _ask(self, masks: Sequence[Prompt], length: int) -> list[str]:
        """With their length in the purpose: spans that begin at one token have one key, and draw apart."""
        purpose = f"rollout/{self.stage.name}/mask_{length}"
        return self.engine.submit(masks, self.stage.group_size, purpose, self.budget)

    def restore(self, rows: Iterable[Row], cursor: int, where: str) -> None:
        """Between two steps nothing is in hand."""
        if list(rows):
            raise UserError(
                f"{where}: holds thoughts of a stage without [stage.masker]; put its configuration back, or choose "
                "another run_dir"
            )
        super().restore((), cursor, where)


def _length(asked: tuple[Lot, Prompt]) -> int:
    return asked[1].horizon
